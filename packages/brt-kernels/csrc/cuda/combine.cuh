// Sums of rows, for combine and for the end of expert_mlp.
#pragma once

#include "device_error.cuh"

namespace brt {

// out[n] = sum over k of weight[row[n, k]] * rows[row[n, k]], in float32, in the order of k. Rows outside [0, R) are
// skipped. numel elements a row.
template <class T, int kCount>
__global__ void __launch_bounds__(256) sum_rows(T* out, const T* rows, const int64_t* row_NK, const float* weight_R,
                                                int64_t num_cells, int64_t num_rows, int64_t num_choices,
                                                int64_t width, Where where, ErrorWord* errors) {
  const int64_t n = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (n >= num_cells) return;
  const int64_t* index = row_NK + n * num_choices;
  const auto* from = reinterpret_cast<const Pack<T, kCount>*>(rows);
  auto* to = reinterpret_cast<Pack<T, kCount>*>(out) + n * width;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    float total[kCount] = {};
#pragma unroll 4
    for (int64_t k = 0; k < num_choices; ++k) {
      const int64_t r = __ldg(index + k);
      if (r < 0 || r >= num_rows) continue;
      const float weight = weight_R ? __ldg(weight_R + r) : 1.0f;
      const Pack<T, kCount> value = from[r * width + i];
#pragma unroll
      for (int j = 0; j < kCount; ++j) total[j] += weight * to_float(value.v[j]);
    }
    Pack<T, kCount> value;
#pragma unroll
    for (int j = 0; j < kCount; ++j) value.v[j] = from_float<T>(total[j]);
    to[i] = value;
  }
  // After the sums, whose loop it would slow down
  for (int64_t k = threadIdx.x; k < num_choices; k += blockDim.x) {
    const int64_t r = __ldg(index + k);
    if (r < -1 || r >= num_rows) tell(errors, where, r, num_rows, n * num_choices + k);
  }
}

template <class T>
void launch_sum_rows(T* out, const T* rows, const int64_t* row_NK, const float* weight_R, int64_t num_cells,
                     int64_t num_rows, int64_t num_choices, int64_t numel, Where where, cudaStream_t stream) {
  constexpr int kWide = 16 / sizeof(T);
  if (numel % kWide == 0 && aligned16(out) && aligned16(rows)) {
    const dim3 block = row_block(numel / kWide);
    sum_rows<T, kWide><<<blocks_for(num_cells, block.y), block, 0, stream>>>(
        out, rows, row_NK, weight_R, num_cells, num_rows, num_choices, numel / kWide, where, error_word());
  } else {
    const dim3 block = row_block(numel);
    sum_rows<T, 1><<<blocks_for(num_cells, block.y), block, 0, stream>>>(
        out, rows, row_NK, weight_R, num_cells, num_rows, num_choices, numel, where, error_word());
  }
}

}  // namespace brt
