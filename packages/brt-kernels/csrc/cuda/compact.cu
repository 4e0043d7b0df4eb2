// compact: the indices of the cells that are kept, in order, then -1; and how many they are. N cells.
#include "../route.h"
#include "common.cuh"

namespace brt {
namespace {

constexpr int kThreads = 1024;  // cells of a block

template <class T>
__global__ void __launch_bounds__(kThreads) count_kept(int* count_B, int64_t* index_N, const T* keep_N,
                                                       int64_t num_cells) {
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n < num_cells) index_N[n] = -1;
  const int count = __syncthreads_count(n < num_cells && keep_N[n] != 0);
  if (threadIdx.x == 0) count_B[blockIdx.x] = count;
}

template <class T>
__global__ void __launch_bounds__(kThreads) place_kept(int64_t* index_N, int64_t* count_1, const int* count_B,
                                                       const T* keep_N, int64_t num_cells) {
  __shared__ int64_t before_shared;
  __shared__ int count_warp[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // 1. Cells kept by the blocks before this one
  if (threadIdx.x == 0) before_shared = 0;
  __syncthreads();
  unsigned long long mine = 0;
  for (int64_t b = threadIdx.x; b < blockIdx.x; b += kThreads) mine += count_B[b];
  if (mine) atomicAdd(reinterpret_cast<unsigned long long*>(&before_shared), mine);
  // 2. Cells kept by the warps before this one
  const int64_t n = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const bool kept = n < num_cells && keep_N[n] != 0;
  const unsigned votes = __ballot_sync(0xffffffffu, kept);
  if (lane == 0) count_warp[warp] = __popc(votes);
  __syncthreads();
  int64_t place = before_shared + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < warp; ++w) place += count_warp[w];
  // 3. This cell, and the total
  if (kept) index_N[place] = n;
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == kThreads - 1) *count_1 = place + kept;
}

}  // namespace

std::tuple<Tensor, Tensor> compact_cuda(const Tensor& keep) {
  check_mask(keep, "keep_N", 1);
  const OnDevice device(keep);
  const Tensor keep_N = as_contiguous(keep);
  const int64_t num_cells = keep.size(0);
  Tensor index_N = new_empty(keep_N, {num_cells}, ScalarType::Long);
  Tensor count_1 = new_empty(keep_N, {1}, ScalarType::Long);
  const unsigned blocks = blocks_for(num_cells > 0 ? num_cells : 1, kThreads);
  const Tensor count_B = new_empty(keep_N, {(int64_t)blocks}, ScalarType::Int);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* from = data_of<T>(keep_N);
    count_kept<T><<<blocks, kThreads, 0, device.stream()>>>(mutable_data_of<int>(count_B),
                                                            mutable_data_of<int64_t>(index_N), from, num_cells);
    place_kept<T><<<blocks, kThreads, 0, device.stream()>>>(mutable_data_of<int64_t>(index_N),
                                                            mutable_data_of<int64_t>(count_1), data_of<int>(count_B),
                                                            from, num_cells);
  };
  if (keep.element_size() == 1) {
    run(uint8_t{});
  } else if (keep.element_size() == 4) {
    run(int32_t{});
  } else {
    run(int64_t{});
  }
  BRT_LAUNCHED();
  return {index_N, count_1};
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("compact", TORCH_BOX(&compact_cuda)); }

}  // namespace brt
