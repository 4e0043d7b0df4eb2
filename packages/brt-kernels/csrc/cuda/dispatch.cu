// dispatch: rows[r] = weight[r] * x[cell[r]], zero where cell[r] is no cell.
// N cells, S trailing cell sizes, R rows, K choices.
#include "device_error.cuh"

namespace brt {
namespace {

// The cell of row r, or -1; a cell that is out of range is told and is none.
__device__ int64_t cell_of(const int64_t* cell_R, int64_t r, int64_t num_cells, ErrorWord* errors) {
  const int64_t cell = cell_R[r];
  if (cell >= 0 && cell < num_cells) return cell;
  if (cell != -1 && threadIdx.x == 0) tell(errors, Where::kDispatchCell, cell, num_cells, r);
  return -1;
}

// `kUnroll` vectors of a row in flight in each thread.
template <class V>
__global__ void __launch_bounds__(256) copy_rows(V* rows, const V* x, const int64_t* cell_R, int64_t num_rows,
                                                 int64_t num_cells, int64_t width, ErrorWord* errors) {
  constexpr int kUnroll = 4;
  const int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (r >= num_rows) return;
  const int64_t cell = cell_of(cell_R, r, num_cells, errors);
  const bool there = cell >= 0;
  const V* from = x + (there ? cell : 0) * width;
  V* to = rows + r * width;
  for (int64_t first = threadIdx.x; first < width; first += blockDim.x * kUnroll) {
    V value[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * blockDim.x;
      if (there && i < width) value[u] = from[i];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * blockDim.x;
      if (i < width) to[i] = value[u];
    }
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(256) scale_rows(T* rows, const T* x, const int64_t* cell_R, const float* weight_R,
                                                  int64_t num_rows, int64_t num_cells, int64_t width,
                                                  ErrorWord* errors) {
  const int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (r >= num_rows) return;
  const int64_t cell = cell_of(cell_R, r, num_cells, errors);
  const bool there = cell >= 0;
  const float weight = weight_R[r];
  const auto* from = reinterpret_cast<const Pack<T, kCount>*>(x) + (there ? cell : 0) * width;
  auto* to = reinterpret_cast<Pack<T, kCount>*>(rows) + r * width;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) {
    Pack<T, kCount> value;
    if (there) value = from[i];
#pragma unroll
    for (int j = 0; j < kCount; ++j) value.v[j] = from_float<T>(there ? weight * to_float(value.v[j]) : 0.0f);
    to[i] = value;
  }
}

template <class V>
void launch_copy(void* rows, const void* x, const int64_t* cell_R, int64_t num_rows, int64_t num_cells,
                 int64_t row_bytes, cudaStream_t stream) {
  const int64_t width = row_bytes / (int64_t)sizeof(V);
  const dim3 block = row_block((width + 3) / 4);
  copy_rows<V><<<blocks_for(num_rows, block.y), block, 0, stream>>>(static_cast<V*>(rows), static_cast<const V*>(x),
                                                                    cell_R, num_rows, num_cells, width, error_word());
}

template <class T, int kCount>
void launch_scale(void* rows, const void* x, const int64_t* cell_R, const float* weight_R, int64_t num_rows,
                  int64_t num_cells, int64_t numel, cudaStream_t stream) {
  const dim3 block = row_block(numel / kCount);
  scale_rows<T, kCount><<<blocks_for(num_rows, block.y), block, 0, stream>>>(
      static_cast<T*>(rows), static_cast<const T*>(x), cell_R, weight_R, num_rows, num_cells, numel / kCount,
      error_word());
}

}  // namespace

Tensor dispatch_cuda(const Tensor& x, const Tensor& cell, const Tensor& row, const std::optional<Tensor>& weight) {
  // 1. Shapes
  BRT_CHECK(x.dim() >= 1, "x_NS must have at least 1 dimension, got a scalar");
  if (weight.has_value()) check_real(x, "x_NS");
  BRT_CHECK(is_movable(x.scalar_type()), "x_NS must be floats, integers or bool, got ", dtype_name(x.scalar_type()));
  check_index(cell, "cell_R", 1);
  check_index(row, "row_NK", 2);
  check_device(cell, "cell_R", x);
  check_device(row, "row_NK", x);
  BRT_CHECK(row.size(0) == x.size(0), "row_NK must have a row for each of ", x.size(0), " cells, got ", shape_of(row));
  const OnDevice device(x);
  const int64_t num_rows = cell.size(0), num_cells = x.size(0);
  const auto weight_R = checked_row_weights(weight, num_rows, x);
  const Tensor x_NS = as_contiguous(x), cell_R = as_int64(cell);

  // 2. Room
  Tensor rows_RS = new_empty(x_NS, with_rows(x_NS, num_rows), x.scalar_type());
  const int64_t numel = row_numel(x_NS), row_bytes = numel * (int64_t)x.element_size();
  if (num_rows == 0 || numel == 0) return rows_RS;
  const void* from = x_NS.const_data_ptr();
  void* to = rows_RS.mutable_data_ptr();
  const int64_t* index = data_of<int64_t>(cell_R);
  const bool wide = row_bytes % 16 == 0 && aligned16(from) && aligned16(to);

  // 3. Move
  if (weight_R) {
    const float* weights = data_of<float>(*weight_R);
    with_real(x, [&](auto zero) {
      using T = decltype(zero);
      if (wide) {
        launch_scale<T, 16 / sizeof(T)>(to, from, index, weights, num_rows, num_cells, numel, device.stream());
      } else {
        launch_scale<T, 1>(to, from, index, weights, num_rows, num_cells, numel, device.stream());
      }
    });
  } else if (wide) {
    launch_copy<uint4>(to, from, index, num_rows, num_cells, row_bytes, device.stream());
  } else if (x.element_size() == 8) {
    launch_copy<uint64_t>(to, from, index, num_rows, num_cells, row_bytes, device.stream());
  } else if (x.element_size() == 4) {
    launch_copy<uint32_t>(to, from, index, num_rows, num_cells, row_bytes, device.stream());
  } else if (x.element_size() == 2) {
    launch_copy<uint16_t>(to, from, index, num_rows, num_cells, row_bytes, device.stream());
  } else {
    launch_copy<uint8_t>(to, from, index, num_rows, num_cells, row_bytes, device.stream());
  }
  BRT_LAUNCHED();
  return rows_RS;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("dispatch", TORCH_BOX(&dispatch_cuda)); }

}  // namespace brt
