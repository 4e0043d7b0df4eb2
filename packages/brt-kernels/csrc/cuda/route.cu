// route and route_mask: decisions become rows grouped by path, in cell order, in three launches and no wait.
// N cells, K choices of a cell, E = N * K entries, P paths, R rows, B blocks.
//
// 1. count: each block counts the paths of its entries.   2. offset: prefix sums over the blocks of each path; the
// last block to end sums over paths.   3. place: each entry finds its rank among its block's and writes its row.
// Where a capacity binds, the three run first over entries in the order in which they are served (all first choices,
// then all second ones) and leave -1 for those beyond it.
#include "../route.h"
#include "common.cuh"

namespace brt {
namespace {

constexpr int kWarps = 8, kSteps = 4;
constexpr int kEntries = kWarps * 32 * kSteps;  // of a block
constexpr int64_t kMaxPaths = 4096;             // a count of each path for each warp, in shared memory
constexpr int kMaxCapacities = 960;             // they travel as a kernel argument

struct Capacities {
  int count;  // 0: none
  int values[kMaxCapacities];
};

template <class T>
struct Entries {
  const T* decision;
  int64_t num_cells, num_choices, num_paths;
  bool mask;    // decision is [N, P] of zero and not zero, not [N, K] of paths
  bool served;  // in the order in which capacity is given out

  __device__ int64_t entry(int64_t i) const {
    return served ? (i % num_cells) * num_choices + i / num_cells : i;
  }
  __device__ int path(int64_t i) const {
    if (i >= num_cells * num_choices) return -1;
    const int64_t e = entry(i);
    const int64_t value = decision[e];
    if (mask) return value != 0 ? (int)(e % num_choices) : -1;
    return value >= 0 && value < num_paths ? (int)value : -1;
  }
};

// Number of entries of this warp's 32 that have the same path, before this one; counts them into count_P.
__device__ int rank_in_step(int path, int* count_P, int lane) {
  const unsigned same = __match_any_sync(0xffffffffu, path);
  const int before = __popc(same & ((1u << lane) - 1));
  int base = 0;
  if (path >= 0) base = count_P[path];
  __syncwarp();
  if (path >= 0 && before == 0) count_P[path] = base + __popc(same);
  __syncwarp();
  return base + before;
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32) count_paths(Entries<T> entries, int* count_PB, int* ended,
                                                           int64_t* cell_R, int64_t* slot_R, int64_t num_rows) {
  extern __shared__ int count_P[];
  const int num_paths = (int)entries.num_paths;
  if (blockIdx.x == 0 && threadIdx.x == 0) *ended = 0;
  for (int p = threadIdx.x; p < num_paths; p += blockDim.x) count_P[p] = 0;
  __syncthreads();
  const int64_t first = int64_t{blockIdx.x} * kEntries;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int path = entries.path(first + s * kWarps * 32 + threadIdx.x);
    if (path >= 0) atomicAdd(count_P + path, 1);
  }
  // Every row is no cell until an entry takes it
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t r = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; r < num_rows; r += stride) {
    cell_R[r] = -1;
    slot_R[r] = -1;
  }
  __syncthreads();
  for (int p = threadIdx.x; p < num_paths; p += blockDim.x) count_PB[int64_t{p} * gridDim.x + blockIdx.x] = count_P[p];
}

// One warp a path: count_PB becomes the entries of the blocks before; load_P the total.
__global__ void __launch_bounds__(256) offset_paths(int* count_PB, int* load_P, int64_t* offsets_P1, int* ended,
                                                    int num_paths, int num_blocks, int64_t multiple) {
  __shared__ bool last;
  __shared__ int64_t sums[256];
  const int lane = threadIdx.x % 32, p = blockIdx.x * 8 + threadIdx.x / 32;
  // 1. Over the blocks of a path
  if (p < num_paths) {
    int* count_B = count_PB + int64_t{p} * num_blocks;
    int total = 0;
    for (int first = 0; first < num_blocks; first += 32) {
      const int b = first + lane, count = b < num_blocks ? count_B[b] : 0;
      int upto = count;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
      }
      if (b < num_blocks) count_B[b] = total + upto - count;
      total += __shfl_sync(0xffffffffu, upto, 31);
    }
    if (lane == 0) load_P[p] = total;
  }
  // 2. Over the paths, by the last block that ends
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ended, 1) == (int)gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  int64_t before = 0;
  if (threadIdx.x == 0) offsets_P1[0] = 0;
  for (int first = 0; first < num_paths; first += 256) {
    const int q = first + threadIdx.x;
    int64_t upto = q < num_paths ? (*(volatile int*)(load_P + q) + multiple - 1) / multiple * multiple : 0;
    sums[threadIdx.x] = upto;
    __syncthreads();
    for (int step = 1; step < 256; step *= 2) {
      const int64_t other = (int)threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
      __syncthreads();
      sums[threadIdx.x] = upto += other;
      __syncthreads();
    }
    if (q < num_paths) offsets_P1[q + 1] = before + upto;
    before += sums[255];
    __syncthreads();
  }
}

// kDrop: writes the path of each entry, -1 beyond its capacity; else its row, and the row's cell and slot.
template <class T, bool kDrop>
__global__ void __launch_bounds__(kWarps * 32) place_entries(Entries<T> entries, const int* count_PB,
                                                             const int64_t* offsets_P1, int64_t* row_NK,
                                                             int64_t* cell_R, int64_t* slot_R, int64_t num_rows,
                                                             int* path_E, Capacities capacities) {
  extern __shared__ int count_WP[];
  const int num_paths = (int)entries.num_paths, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = threadIdx.x; i < kWarps * num_paths; i += blockDim.x) count_WP[i] = 0;
  __syncthreads();
  // 1. Rank among the entries of the warp, which are consecutive
  const int64_t first = int64_t{blockIdx.x} * kEntries + warp * 32 * kSteps;
  int path[kSteps], rank[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    path[s] = entries.path(first + s * 32 + lane);
    rank[s] = rank_in_step(path[s], count_WP + warp * num_paths, lane);
  }
  __syncthreads();
  // 2. Counts become the entries of the warps, and the blocks, before
  for (int p = threadIdx.x; p < num_paths; p += blockDim.x) {
    int before = count_PB[int64_t{p} * gridDim.x + blockIdx.x];
    for (int w = 0; w < kWarps; ++w) {
      const int count = count_WP[w * num_paths + p];
      count_WP[w * num_paths + p] = before;
      before += count;
    }
  }
  __syncthreads();
  // 3. Results
  const int64_t num_entries = entries.num_cells * entries.num_choices;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t i = first + s * 32 + lane;
    if (i >= num_entries) continue;
    const int64_t e = entries.entry(i);
    const int64_t place = path[s] < 0 ? -1 : int64_t{count_WP[warp * num_paths + path[s]]} + rank[s];
    if (kDrop) {
      const int limit = path[s] < 0 ? 0 : capacities.values[capacities.count == 1 ? 0 : path[s]];
      path_E[e] = path[s] >= 0 && place < limit ? path[s] : -1;
      continue;
    }
    const int64_t row = path[s] < 0 ? -1 : offsets_P1[path[s]] + place;
    row_NK[e] = row;
    if (row >= 0 && row < num_rows) {
      slot_R[row] = e;
      cell_R[row] = e / entries.num_choices;
    }
  }
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Routed carry_out(const Tensor& like, Entries<T> entries, const RouteOptions& options, cudaStream_t stream) {
  // 1. Room
  const int64_t num_entries = checked_size(entries.num_cells, entries.num_choices, 0), num_paths = entries.num_paths;
  BRT_CHECK(num_entries < (int64_t{1} << 31), num_entries, " choices are too many");
  const int64_t num_rows = checked_size(num_paths, options.multiple - 1, num_entries);
  Tensor cell_R = new_empty(like, {num_rows}, ScalarType::Long), slot_R = new_empty(like, {num_rows}, ScalarType::Long);
  Tensor row_NK = new_empty(like, {entries.num_cells, entries.num_choices}, ScalarType::Long);
  Tensor offsets_P1 = new_empty(like, {num_paths + 1}, ScalarType::Long);
  const unsigned blocks = blocks_for(num_entries > 0 ? num_entries : 1, kEntries);
  const Tensor count_PB = new_empty(like, {num_paths * blocks + num_paths + 1}, ScalarType::Int);
  int* counts = mutable_data_of<int>(count_PB);
  int *load_P = counts + num_paths * blocks, *ended = load_P + num_paths;
  Capacities capacities{};
  if (options.capacity) {
    BRT_CHECK(options.capacity->size() <= kMaxCapacities, "on CUDA up to ", kMaxCapacities, " capacities, got ",
              options.capacity->size());
    for (const int64_t value : *options.capacity) {
      capacities.values[capacities.count++] = (int)std::max<int64_t>(0, std::min<int64_t>(value, 0x7fffffff));
    }
  }
  const size_t shared = num_paths * sizeof(int);
  const auto count_and_offset = [&](auto some) {
    count_paths<<<blocks, kWarps * 32, shared, stream>>>(some, counts, ended, mutable_data_of<int64_t>(cell_R),
                                                         mutable_data_of<int64_t>(slot_R), num_rows);
    offset_paths<<<std::max<unsigned>(1, blocks_for(num_paths, 8)), 256, 0, stream>>>(
        counts, load_P, mutable_data_of<int64_t>(offsets_P1), ended, (int)num_paths, (int)blocks, options.multiple);
  };
  const auto place = [&](auto kernel, auto some, int* path_E) {
    BRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(kWarps * shared)));
    kernel<<<blocks, kWarps * 32, kWarps * shared, stream>>>(
        some, counts, data_of<int64_t>(offsets_P1), mutable_data_of<int64_t>(row_NK), mutable_data_of<int64_t>(cell_R),
        mutable_data_of<int64_t>(slot_R), num_rows, path_E, capacities);
  };
  // 2. Without the entries beyond a capacity
  if (options.capacity) {
    const Tensor kept = new_empty(like, {num_entries}, ScalarType::Int);
    entries.served = true;
    count_and_offset(entries);
    place(place_entries<T, true>, entries, mutable_data_of<int>(kept));
    const Entries<int> rest{data_of<int>(kept), entries.num_cells, entries.num_choices, num_paths, false, false};
    count_and_offset(rest);
    place(place_entries<int, false>, rest, nullptr);
  } else {
    count_and_offset(entries);
    place(place_entries<T, false>, entries, nullptr);
  }
  BRT_LAUNCHED();
  return {cell_R, slot_R, row_NK, offsets_P1};
}

void check_supported(const RouteOptions& options, const std::optional<Tensor>& priority, int64_t num_paths) {
  BRT_CHECK(num_paths <= kMaxPaths, "on CUDA up to ", kMaxPaths, " paths, got ", num_paths);
  BRT_CHECK(!options.capacity || (!priority.has_value() && options.group_size == 0),
            "on CUDA a capacity is given first come, in one group");
}

}  // namespace

Routed route_cuda(const Tensor& choice, int64_t num_paths, std::optional<std::vector<int64_t>> capacity,
                  const std::optional<Tensor>& priority, int64_t group_size, int64_t multiple) {
  check_index(choice, "choice_NK", 2);
  const RouteOptions options = checked_options(choice, num_paths, std::move(capacity), priority, group_size, multiple);
  check_supported(options, priority, num_paths);
  const OnDevice device(choice);
  const Tensor choice_NK = as_contiguous(choice);
  if (choice.scalar_type() == ScalarType::Int) {
    return carry_out(choice_NK, Entries<int>{data_of<int>(choice_NK), choice.size(0), choice.size(1), num_paths, false,
                                             false}, options, device.stream());
  }
  return carry_out(choice_NK, Entries<int64_t>{data_of<int64_t>(choice_NK), choice.size(0), choice.size(1), num_paths,
                                               false, false}, options, device.stream());
}

Routed route_mask_cuda(const Tensor& mask, std::optional<std::vector<int64_t>> capacity,
                       const std::optional<Tensor>& priority, int64_t group_size, int64_t multiple) {
  check_mask(mask, "mask_NP", 2);
  const int64_t num_cells = mask.size(0), num_paths = mask.size(1);
  const RouteOptions options = checked_options(mask, num_paths, std::move(capacity), priority, group_size, multiple);
  check_supported(options, priority, num_paths);
  const OnDevice device(mask);
  const Tensor mask_NP = as_contiguous(mask);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return carry_out(mask_NP, Entries<T>{data_of<T>(mask_NP), num_cells, num_paths, num_paths, true, false}, options,
                     device.stream());
  };
  if (mask.element_size() == 1) return run(uint8_t{});
  return mask.element_size() == 4 ? run(int32_t{}) : run(int64_t{});
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) {
  m.impl("route", TORCH_BOX(&route_cuda));
  m.impl("route_mask", TORCH_BOX(&route_mask_cuda));
}

}  // namespace brt
