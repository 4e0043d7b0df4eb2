// row_dot: out[r] = <rows[r], cells[cell[r]]>, zero where cell[r] is no cell.
// N cells, S trailing cell sizes, R rows, K choices.
#include "device_error.cuh"

namespace brt {
namespace {

// One warp a row.
template <class T, int kCount>
__global__ void __launch_bounds__(256) dot_rows(float* out_R, const T* rows, const T* cells, const int64_t* cell_R,
                                                int64_t num_rows, int64_t num_cells, int64_t width,
                                                ErrorWord* errors) {
  const int64_t r = int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (r >= num_rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t cell = cell_R[r];
  float total = 0;
  if (cell >= 0 && cell < num_cells) {
    const auto* a = reinterpret_cast<const Pack<T, kCount>*>(rows) + r * width;
    const auto* b = reinterpret_cast<const Pack<T, kCount>*>(cells) + cell * width;
#pragma unroll 4
    for (int64_t i = lane; i < width; i += 32) {
      const Pack<T, kCount> x = a[i], y = b[i];
#pragma unroll
      for (int j = 0; j < kCount; ++j) total += to_float(x.v[j]) * to_float(y.v[j]);
    }
  } else if (cell != -1 && lane == 0) {
    tell(errors, Where::kRowDotCell, cell, num_cells, r);
  }
  for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
  if (lane == 0) out_R[r] = total;
}

}  // namespace

Tensor row_dot_cuda(const Tensor& rows, const Tensor& cells, const Tensor& cell, const Tensor& row) {
  BRT_CHECK(rows.dim() >= 1 && cells.dim() == rows.dim(), "rows_RS and cells_NS must have the same rank, got ",
            shape_of(rows), " and ", shape_of(cells));
  for (int64_t i = 1; i < rows.dim(); ++i) {
    BRT_CHECK(rows.size(i) == cells.size(i), "rows_RS and cells_NS differ in size ", i, ": ", shape_of(rows), ", ",
              shape_of(cells));
  }
  check_real(rows, "rows_RS");
  BRT_CHECK(cells.scalar_type() == rows.scalar_type(), "cells_NS must be ", dtype_name(rows.scalar_type()), ", got ",
            dtype_name(cells.scalar_type()));
  check_index(cell, "cell_R", 1);
  check_index(row, "row_NK", 2);
  check_device(cells, "cells_NS", rows);
  check_device(cell, "cell_R", rows);
  const OnDevice device(rows);
  const int64_t num_rows = rows.size(0);
  BRT_CHECK(cell.size(0) == num_rows, "cell_R must be [", num_rows, "], got ", shape_of(cell));
  const Tensor rows_RS = as_contiguous(rows), cells_NS = as_contiguous(cells), cell_R = as_int64(cell);
  Tensor out_R = new_empty(rows_RS, {num_rows}, ScalarType::Float);
  const int64_t numel = row_numel(rows_RS);
  if (num_rows == 0) return out_R;
  with_real(rows, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWide = 16 / sizeof(T);
    const T *a = data_of<T>(rows_RS), *b = data_of<T>(cells_NS);
    float* out = mutable_data_of<float>(out_R);
    const unsigned blocks = blocks_for(num_rows, 8);
    if (numel % kWide == 0 && aligned16(a) && aligned16(b)) {
      dot_rows<T, kWide><<<blocks, 256, 0, device.stream()>>>(out, a, b, data_of<int64_t>(cell_R), num_rows,
                                                              cells.size(0), numel / kWide, error_word());
    } else {
      dot_rows<T, 1><<<blocks, 256, 0, device.stream()>>>(out, a, b, data_of<int64_t>(cell_R), num_rows,
                                                          cells.size(0), numel, error_word());
    }
  });
  BRT_LAUNCHED();
  return out_R;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("row_dot", TORCH_BOX(&row_dot_cuda)); }

}  // namespace brt
