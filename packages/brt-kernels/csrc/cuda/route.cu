// route and route_mask: decisions become rows grouped by path, in cell order, in one or two launches and no wait.
// N cells, K choices of a cell, E = N * K entries, P paths, R rows, B blocks, W warps.
//
// A block has a span of consecutive entries. 1. count: the entries of each span, by path. 2. place: each block reads
// the counts of all of them, and so learns where every path begins and how many entries come before its own; an entry's
// row is that plus its rank in the span. To read all counts in every block takes less time than one more launch.
// Where a chunk a block is enough, both are one cooperative launch: blocks wait for each other's counts.
// Where a capacity binds, this runs first over entries in the order in which they are served (all first choices, then
// all second ones; cells by priority) and leaves -1 for those beyond it. Where it counts within groups, a block serves
// a group by itself.
#include "../route.h"
#include "device_error.cuh"

#include <cooperative_groups.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace brt {
namespace {

constexpr int kSteps = 2;                    // entries of a thread at a time
constexpr int64_t kMaxPaths = 4096;          // what is kept for each path fits the shared memory of sm_80
constexpr int kMaxCapacities = 960;          // they travel as a kernel argument
constexpr int kMaxSums = 16;                 // partial sums of a path's counts
constexpr int64_t kMaxGroupEntries = 65536;  // a block serves a group by itself

template <class T>
struct Entries {
  const T* decision;
  unsigned num_cells, num_choices, num_entries;
  int num_paths;
  bool mask;                // decision is [N, P] of zero and not zero, not [N, K] of paths
  unsigned group_cells;     // in the order in which capacity is given out, by groups of so many cells; 0: as they lie
  const int64_t* order_GS;  // of the cells of a group, or null: as they lie

  T element() const;  // for decltype
  __device__ unsigned entry(unsigned i) const {
    if (group_cells == 0) return i;
    const unsigned group_size = group_cells * num_choices, first = i / group_size * group_cells, j = i % group_size;
    const unsigned cells = min(group_cells, num_cells - first);
    const unsigned cell = order_GS ? (unsigned)order_GS[first + j % cells] : j % cells;
    return (first + cell) * num_choices + j / cells;
  }
  // Of an entry, as the decision says it; -1: none. What is neither a path nor -1 is told where errors are kept.
  __device__ int path(unsigned e, int64_t value, ErrorWord* errors) const {
    if (mask) return value != 0 ? (int)(e % num_choices) : -1;
    if (value >= 0 && value < num_paths) return (int)value;
    if (value != -1 && errors) tell(errors, Where::kRouteChoice, value, num_paths, e);
    return -1;
  }
  // Of the entries index(s) before `last`: all are on their way before the first is looked at, and `meanwhile` runs.
  template <class Index, class Meanwhile>
  __device__ __forceinline__ void paths(const Index& index, unsigned last, ErrorWord* errors, int (&path_S)[kSteps],
                                        const Meanwhile& meanwhile) const {
    T value[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) value[s] = index(s) < last ? decision[entry(index(s))] : T{};
    meanwhile();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) path_S[s] = index(s) < last ? path(entry(index(s)), value[s], errors) : -1;
  }
};

struct Span {
  unsigned first, last;
  __device__ Span(unsigned num_entries, unsigned span)
      : first(blockIdx.x * span), last(min(blockIdx.x * span + span, num_entries)) {}
};

// ---- 1. Count ----

// Counts of a block are a row of padded_paths, whole 16-byte pieces.
template <int kWarps, class T, class Count>
__global__ void __launch_bounds__(kWarps * 32) count_paths(Entries<T> entries, unsigned span_size, Count* count_BP,
                                                           int padded_paths, ErrorWord* errors) {
  constexpr int kThreads = kWarps * 32, kChunk = kThreads * kSteps;
  extern __shared__ __align__(16) char shared[];
  int* count_P = reinterpret_cast<int*>(shared);
#if __CUDA_ARCH__ >= 900
  // The placing blocks may start and read their entries; they wait for this grid before they read counts
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  for (int p = threadIdx.x; p < padded_paths; p += kThreads) count_P[p] = 0;
  __syncthreads();
  const Span span(entries.num_entries, span_size);
  for (unsigned from = span.first; from < span.last; from += kChunk) {
    int path[kSteps];
    entries.paths([&](int s) { return from + s * kThreads + threadIdx.x; }, span.last, errors, path, [] {});
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (path[s] >= 0) atomicAdd(count_P + path[s], 1);
    }
  }
  __syncthreads();
  Count* to = count_BP + int64_t{blockIdx.x} * padded_paths;
  for (int p = threadIdx.x; p < padded_paths; p += kThreads) to[p] = (Count)count_P[p];
}

// ---- 2. Place ----

// What the two kinds of placing make: the rows, or the entries that a capacity keeps.
struct Rows {
  int64_t *row_NK, *cell_R, *slot_R, *offsets_P1, num_rows, multiple;
};
struct Kept {
  int* path_E;  // -1 beyond the capacity
  int count;    // of limits: one, or one a path
  int limits[kMaxCapacities];
};

// Shared memory of placing.
template <int kWarps>
struct Room {
  int64_t* first_P;          // row where the next chunk's entries of a path begin
  int* sums;                 // [S][2][padded]: partial sums of counts, of all blocks and of those before this
  unsigned short* count_WP;  // entries of a chunk by warp
  int* place_P;              // [padded + 1]: where a path begins among the entries of a chunk

  // How the threads share the sums: `width` along a row of counts, `height` rows.
  static __host__ __device__ int width(int vectors) {
    int x = 8;
    while (x < kWarps * 32 && x < vectors) x *= 2;
    return x;
  }
  static __host__ __device__ int height(int vectors) {
    return kWarps * 32 / width(vectors) < kMaxSums ? kWarps * 32 / width(vectors) : kMaxSums;
  }
  static size_t bytes(int padded_paths, int vectors) {
    return padded_paths * (sizeof(int64_t) + 2 * height(vectors) * sizeof(int) + kWarps * sizeof(short) + sizeof(int)) +
        sizeof(int);
  }
  __device__ Room(char* shared, int padded_paths, int vectors) {
    first_P = reinterpret_cast<int64_t*>(shared);
    sums = reinterpret_cast<int*>(first_P + padded_paths);
    count_WP = reinterpret_cast<unsigned short*>(sums + 2 * height(vectors) * padded_paths);
    place_P = reinterpret_cast<int*>(count_WP + kWarps * padded_paths);
  }
};

// Sum of `value` over the threads before this one, and over all of them.
template <int kWarps, class T>
__device__ T sum_before(T value, T& total) {
  __shared__ T sum_W[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T upto = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) sum_W[warp] = upto;
  __syncthreads();
  T before = upto - value;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += sum_W[w];
    total += sum_W[w];
  }
  __syncthreads();
  return before;
}

// Partial sums of the counts of all blocks.
template <int kWarps, class Count>
__device__ void sum_counts(const Count* count_BP, int padded_paths, int* sums) {
  constexpr int kVector = 16 / sizeof(Count), kBatch = 8;  // loads in flight
  const int vectors = padded_paths / kVector;
  const int width = Room<kWarps>::width(vectors), height = Room<kWarps>::height(vectors);
  const int x = threadIdx.x % width, y = threadIdx.x / width;
  if (y >= height) return;
  for (int v = x; v < vectors; v += width) {
    int total[kVector] = {}, before[kVector] = {};
    for (unsigned first = y; first < gridDim.x; first += height * kBatch) {
      uint4 raw[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        // From L2: lines of an earlier launch's counts must not be met in L1
        const unsigned b = first + u * height;
        raw[u] = make_uint4(0, 0, 0, 0);
        if (b < gridDim.x) raw[u] = __ldcg(reinterpret_cast<const uint4*>(count_BP + int64_t{b} * padded_paths) + v);
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        Pack<Count, kVector> count;
        memcpy(&count, &raw[u], sizeof count);
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          total[j] += count.v[j];
          before[j] += first + u * height < blockIdx.x ? (int)count.v[j] : 0;
        }
      }
    }
    int* to = sums + y * 2 * padded_paths + v * kVector;
#pragma unroll
    for (int j = 0; j < kVector; j += 4) {
      *reinterpret_cast<int4*>(to + j) = make_int4(total[j], total[j + 1], total[j + 2], total[j + 3]);
      *reinterpret_cast<int4*>(to + padded_paths + j) =
          make_int4(before[j], before[j + 1], before[j + 2], before[j + 3]);
    }
  }
}

__device__ int64_t rounded_up(int64_t value, int64_t multiple) {
  return multiple == 1 ? value : (value + multiple - 1) / multiple * multiple;
}

// first_P of this block; of all rows those that no entry takes become -1.
template <int kWarps>
__device__ void begin_rows(const Rows& to, const Room<kWarps>& room, int num_paths, int padded_paths, int height) {
  constexpr int kThreads = kWarps * 32;
  int64_t end = 0;
  for (int base = 0; base < padded_paths; base += kThreads) {
    const int p = base + threadIdx.x;
    int total = 0, before = 0;
    if (p < padded_paths) {
#pragma unroll 8
      for (int y = 0; y < height; ++y) {
        total += room.sums[y * 2 * padded_paths + p];
        before += room.sums[(y * 2 + 1) * padded_paths + p];
      }
    }
    const int64_t rows = rounded_up(total, to.multiple);
    int64_t all;
    const int64_t start = end + sum_before<kWarps>(rows, all);
    end += all;
    if (p >= padded_paths) continue;
    room.first_P[p] = start + before;
    room.sums[p] = total - before;  // rows of the path from first_P on
    if (blockIdx.x == 0 && p < num_paths) to.offsets_P1[p + 1] = start + rows;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) to.offsets_P1[0] = 0;
  const auto leave = [&](int64_t r) { to.cell_R[r] = to.slot_R[r] = -1; };
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t r = end + int64_t{blockIdx.x} * kThreads + threadIdx.x; r < to.num_rows; r += stride) leave(r);
  __syncthreads();
  if (to.multiple == 1) return;
  for (int p = blockIdx.x; p < num_paths; p += gridDim.x) {
    const int64_t last = room.first_P[p] + room.sums[p], stop = rounded_up(last, to.multiple);
    for (int64_t r = last + threadIdx.x; r < stop; r += kThreads) leave(r);
  }
}

// first_P counts the entries of the path that were served before.
template <int kWarps>
__device__ void begin_rows(const Kept&, const Room<kWarps>& room, int, int padded_paths, int height) {
  for (int p = threadIdx.x; p < padded_paths; p += kWarps * 32) {
    int before = 0;
    for (int y = 0; y < height; ++y) before += room.sums[(y * 2 + 1) * padded_paths + p];
    room.first_P[p] = before;
  }
  __syncthreads();
}

// Number of entries of this warp's 32 that have the same path, before this one; counts them into count_P.
__device__ int rank_in_step(int path, unsigned short* count_P, int lane) {
  const unsigned same = __match_any_sync(0xffffffffu, path);
  const int before = __popc(same & ((1u << lane) - 1));
  int base = 0;
  if (path >= 0) base = count_P[path];
  __syncwarp();
  if (path >= 0 && before == 0) count_P[path] = (unsigned short)(base + __popc(same));
  __syncwarp();
  return base + before;
}

// How a block learns what the others count.
enum class Counts {
  kGiven,     // by the launch before
  kTogether,  // by this launch: a cooperative one, of spans of one chunk
  kAlone,     // it need not: its span is a group
};

template <int kWarps, Counts kCounts, class T, class Count, class To>
__global__ void __launch_bounds__(kWarps * 32, 1024 / (kWarps * 32))
    place_entries(Entries<T> entries, unsigned span_size, Count* count_BP, int padded_paths, To to, ErrorWord* errors) {
  constexpr bool kRows = std::is_same_v<To, Rows>;
  constexpr int kThreads = kWarps * 32, kChunk = kThreads * kSteps;
  extern __shared__ __align__(16) char shared[];
  __shared__ unsigned sorted[kRows ? kChunk : 1];  // path << 16 | position in the chunk, by path
  const int vectors = padded_paths * (int)sizeof(Count) / 16;
  const Room<kWarps> room(shared, padded_paths, vectors);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Span span(entries.num_entries, span_size);
  const auto position = [&](int s) { return (unsigned)((warp * kSteps + s) * 32 + lane); };

  for (unsigned from = span.first; from < span.last || from == span.first; from += kChunk) {
    // 1. Rank among the entries of the warp, which are consecutive
    int path[kSteps], rank[kSteps];
    entries.paths([&](int s) { return from + position(s); }, span.last, errors, path, [&] {
      for (int i = threadIdx.x; i < kWarps * padded_paths / 8; i += kThreads) {
        reinterpret_cast<uint4*>(room.count_WP)[i] = make_uint4(0, 0, 0, 0);
      }
      __syncthreads();
    });
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      rank[s] = rank_in_step(path[s], room.count_WP + warp * padded_paths, lane);
    }
    __syncthreads();
    // 2. Counts become the entries of the warps before; places of the paths among the entries of the chunk
    int num_placed = 0;
    for (int base = 0; base < padded_paths; base += kThreads) {
      const int p = base + threadIdx.x;
      int upto = 0;
      if (p < padded_paths) {
        int count_W[kWarps];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) count_W[w] = room.count_WP[w * padded_paths + p];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          room.count_WP[w * padded_paths + p] = (unsigned short)upto;
          upto += count_W[w];
        }
        if (kCounts == Counts::kTogether) count_BP[int64_t{blockIdx.x} * padded_paths + p] = (Count)upto;
      }
      int all;
      const int place = num_placed + sum_before<kWarps>(upto, all);
      if (p < padded_paths) room.place_P[p] = place;
      num_placed += all;
    }
    if (threadIdx.x == 0) room.place_P[padded_paths] = num_placed;
    // 3. Where the paths begin
    if (from == span.first) {
      if constexpr (kCounts == Counts::kAlone) {
        for (int p = threadIdx.x; p < padded_paths; p += kThreads) room.first_P[p] = 0;
      } else {
        if constexpr (kCounts == Counts::kTogether) {
          cooperative_groups::this_grid().sync();
        } else {
#if __CUDA_ARCH__ >= 900
          asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
        }
        sum_counts<kWarps>(count_BP, padded_paths, room.sums);
        __syncthreads();
        begin_rows(to, room, entries.num_paths, padded_paths, Room<kWarps>::height(vectors));
      }
    }
    __syncthreads();
    // 4. Results, in the order of entries
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const unsigned i = from + position(s);
      if (i >= span.last) continue;
      const unsigned e = entries.entry(i);
      int64_t row = -1;
      if (path[s] >= 0) {
        const int within = room.count_WP[warp * padded_paths + path[s]] + rank[s];
        row = room.first_P[path[s]] + within;
        if constexpr (kRows) sorted[room.place_P[path[s]] + within] = (unsigned)path[s] << 16 | position(s);
      }
      if constexpr (kRows) {
        to.row_NK[e] = row;
      } else {
        const int limit = path[s] < 0 ? 0 : to.limits[to.count == 1 ? 0 : path[s]];
        to.path_E[e] = row < limit ? path[s] : -1;
      }
    }
    // 5. Results, in the order of rows: neighbours lie beside each other
    if constexpr (kRows) {
      __syncthreads();
      for (int j = threadIdx.x; j < num_placed; j += kThreads) {
        const int p = (int)(sorted[j] >> 16);
        const unsigned e = from + (sorted[j] & 0xffff);
        const int64_t row = room.first_P[p] + (j - room.place_P[p]);
        to.slot_R[row] = e;
        to.cell_R[row] = e / entries.num_choices;
      }
    }
    // 6. On to the next chunk
    if (kCounts == Counts::kTogether || from + kChunk >= span.last) break;
    __syncthreads();
    for (int p = threadIdx.x; p < padded_paths; p += kThreads) {
      room.first_P[p] += room.place_P[p + 1] - room.place_P[p];
    }
    __syncthreads();
  }
}

// ---- Launches ----

struct Plan {
  unsigned blocks, span;  // entries of a block
  int padded_paths;
  bool wide;      // blocks of 16 warps, not of 8: where there are not so many paths that they need the room
  bool narrow;    // counts fit 16 bits
  bool together;  // count and place in one launch
  bool overlap;   // the second launch may begin before the first ends
};

Plan plan_for(int64_t num_entries, int64_t num_paths, int device) {
  Plan plan{};
  plan.wide = num_paths <= 1024;
  // Every block reads the counts of all blocks
  const int64_t most_blocks = num_paths <= 512 ? 256 : 64, chunk_size = (plan.wide ? 16 : 8) * 32 * kSteps;
  const int64_t chunks = (num_entries + chunk_size - 1) / chunk_size;
  const int64_t span = (chunks + most_blocks - 1) / most_blocks * chunk_size;
  int major = 0, num_sms = 0;
  BRT_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  BRT_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  plan.span = (unsigned)(span > 0 ? span : chunk_size);
  plan.blocks = (unsigned)(num_entries > 0 ? (num_entries + plan.span - 1) / plan.span : 1);
  plan.padded_paths = (int)std::max<int64_t>(8, (num_paths + 7) / 8 * 8);
  plan.narrow = plan.span <= 0xffff;
  if (!plan.narrow) plan.wide = false;  // a chunk of either size divides the span
  plan.together = plan.wide && plan.span == chunk_size && plan.blocks <= (unsigned)num_sms;
  plan.overlap = major >= 9;
  return plan;
}

template <int kWarps, Counts kCounts, class T, class Count, class To>
void place(Entries<T> entries, const To& to, const Plan& plan, Count* counts, ErrorWord* errors, cudaStream_t stream) {
  const auto kernel = place_entries<kWarps, kCounts, T, Count, To>;
  const size_t shared = Room<kWarps>::bytes(plan.padded_paths, plan.padded_paths * (int)sizeof(Count) / 16);
  if (shared > 38 << 10) {  // with the arrays of static size, 48 KiB are given unasked
    BRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
  }
  cudaLaunchAttribute attribute{};
  if (kCounts == Counts::kTogether) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.blocks);
  config.blockDim = dim3(kWarps * 32);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = kCounts == Counts::kTogether || (kCounts == Counts::kGiven && plan.overlap) ? 1 : 0;
  BRT_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, entries, plan.span, counts, plan.padded_paths, to, errors));
}

template <int kWarps, class T, class Count, class To>
void count_and_place(Entries<T> entries, const To& to, const Plan& plan, void* room, ErrorWord* errors,
                     cudaStream_t stream) {
  const auto counts = static_cast<Count*>(room);
  if constexpr (kWarps == 16 && sizeof(Count) == 2) {
    if (plan.together) return place<kWarps, Counts::kTogether>(entries, to, plan, counts, errors, stream);
  }
  count_paths<kWarps, T, Count><<<plan.blocks, kWarps * 32, plan.padded_paths * sizeof(int), stream>>>(
      entries, plan.span, counts, plan.padded_paths, errors);
  place<kWarps, Counts::kGiven>(entries, to, plan, counts, nullptr, stream);
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

int64_t cells_of_group(const RouteOptions& options, int64_t num_cells) {
  return options.group_size > 0 ? std::min(options.group_size, num_cells) : num_cells;
}

// The order in which the cells of each group are served: descending priority, stable, as torch sorts.
Tensor served_order(const Tensor& priority_N, int64_t num_cells, int64_t group_cells) {
  const int64_t shape[2] = {num_cells / group_cells, group_cells};
  const Tensor priority_GS = torch::stable::reshape(priority_N, {shape, 2});
  StableIValue stack[4] = {torch::stable::detail::from(priority_GS), torch::stable::detail::from(true),
                           torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(true)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::argsort", "stable", stack, TORCH_ABI_VERSION));
  return as_contiguous(torch::stable::detail::to<Tensor>(stack[0]));
}

template <class T>
Routed carry_out(const Tensor& like, const T* decision, int64_t num_choices, int64_t num_paths, bool mask,
                 const RouteOptions& options, const std::optional<Tensor>& priority, cudaStream_t stream) {
  // 1. Room
  const int64_t num_cells = like.size(0), num_entries = checked_size(num_cells, num_choices, 0);
  BRT_CHECK(num_entries < (int64_t{1} << 31), num_entries, " choices are too many");
  const int64_t num_rows = checked_size(num_paths, options.multiple - 1, num_entries);
  const Plan plan = plan_for(num_entries, num_paths, like.get_device_index());
  Tensor cell_R = new_empty(like, {num_rows}, ScalarType::Long), slot_R = new_empty(like, {num_rows}, ScalarType::Long);
  Tensor row_NK = new_empty(like, {num_cells, num_choices}, ScalarType::Long);
  Tensor offsets_P1 = new_empty(like, {num_paths + 1}, ScalarType::Long);
  const int64_t counts_size = int64_t{plan.blocks} * plan.padded_paths;
  const Tensor count_BP = new_empty(like, {plan.narrow ? counts_size / 2 : counts_size}, ScalarType::Int);
  void* counts = mutable_data_of<int>(count_BP);
  Entries<T> entries{decision, (unsigned)num_cells, (unsigned)num_choices, (unsigned)num_entries, (int)num_paths,
                     mask, 0, nullptr};
  const auto run = [&](auto some, const auto& to, ErrorWord* errors) {
    if (plan.narrow && plan.wide) {
      count_and_place<16, decltype(some.element()), unsigned short>(some, to, plan, counts, errors, stream);
    } else if (plan.narrow) {
      count_and_place<8, decltype(some.element()), unsigned short>(some, to, plan, counts, errors, stream);
    } else {
      count_and_place<8, decltype(some.element()), int>(some, to, plan, counts, errors, stream);
    }
  };
  const Rows rows{mutable_data_of<int64_t>(row_NK), mutable_data_of<int64_t>(cell_R), mutable_data_of<int64_t>(slot_R),
                  mutable_data_of<int64_t>(offsets_P1), num_rows, options.multiple};
  // 2. Without the entries beyond a capacity
  if (options.capacity && num_entries > 0) {
    const Tensor path_NK = new_empty(like, {num_cells, num_choices}, ScalarType::Int);
    Kept kept{mutable_data_of<int>(path_NK), 0, {}};
    BRT_CHECK(options.capacity->size() <= kMaxCapacities, "on CUDA up to ", kMaxCapacities, " capacities, got ",
              options.capacity->size());
    for (const int64_t value : *options.capacity) {
      kept.limits[kept.count++] = (int)std::max<int64_t>(0, std::min<int64_t>(value, 0x7fffffff));
    }
    const int64_t group_cells = cells_of_group(options, num_cells);
    std::optional<Tensor> order_GS;
    if (priority.has_value()) order_GS = served_order(*priority, num_cells, group_cells);
    entries.group_cells = (unsigned)group_cells;
    entries.order_GS = order_GS ? data_of<int64_t>(*order_GS) : nullptr;
    if (group_cells < num_cells) {
      Plan groups = plan;
      groups.span = (unsigned)(group_cells * num_choices);
      groups.blocks = blocks_for(num_cells, group_cells);
      place<8, Counts::kAlone>(entries, kept, groups, static_cast<int*>(nullptr), error_word(), stream);
    } else {
      run(entries, kept, error_word());
    }
    run(Entries<int>{kept.path_E, entries.num_cells, entries.num_choices, entries.num_entries, entries.num_paths, false,
                     0, nullptr}, rows, nullptr);
  } else {
    run(entries, rows, error_word());
  }
  BRT_LAUNCHED();
  return {cell_R, slot_R, row_NK, offsets_P1};
}

void check_supported(const RouteOptions& options, const std::optional<Tensor>& priority, int64_t num_cells,
                     int64_t num_choices, int64_t num_paths) {
  BRT_CHECK(num_paths <= kMaxPaths, "on CUDA up to ", kMaxPaths, " paths, got ", num_paths);
  const int64_t group_cells = cells_of_group(options, num_cells);
  if (!options.capacity || group_cells == num_cells) return;
  BRT_CHECK(checked_size(group_cells, num_choices, 0) <= kMaxGroupEntries, "on CUDA a group has up to ",
            kMaxGroupEntries, " choices, got ", group_cells * num_choices);
  BRT_CHECK(!priority.has_value() || num_cells % group_cells == 0,
            "on CUDA groups of cells with priorities are of one size, got ", num_cells, " cells in groups of ",
            group_cells);
}

}  // namespace

Routed route_cuda(const Tensor& choice, int64_t num_paths, std::optional<std::vector<int64_t>> capacity,
                  const std::optional<Tensor>& priority, int64_t group_size, int64_t multiple) {
  check_index(choice, "choice_NK", 2);
  const RouteOptions options = checked_options(choice, num_paths, std::move(capacity), priority, group_size, multiple);
  check_supported(options, priority, choice.size(0), choice.size(1), num_paths);
  const OnDevice device(choice);
  const Tensor choice_NK = as_contiguous(choice);
  if (choice.scalar_type() == ScalarType::Int) {
    return carry_out(choice_NK, data_of<int>(choice_NK), choice.size(1), num_paths, false, options, priority,
                     device.stream());
  }
  return carry_out(choice_NK, data_of<int64_t>(choice_NK), choice.size(1), num_paths, false, options, priority,
                     device.stream());
}

Routed route_mask_cuda(const Tensor& mask, std::optional<std::vector<int64_t>> capacity,
                       const std::optional<Tensor>& priority, int64_t group_size, int64_t multiple) {
  check_mask(mask, "mask_NP", 2);
  const int64_t num_paths = mask.size(1);
  const RouteOptions options = checked_options(mask, num_paths, std::move(capacity), priority, group_size, multiple);
  check_supported(options, priority, mask.size(0), num_paths, num_paths);
  const OnDevice device(mask);
  const Tensor mask_NP = as_contiguous(mask);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return carry_out(mask_NP, data_of<T>(mask_NP), num_paths, num_paths, true, options, priority, device.stream());
  };
  if (mask.element_size() == 1) return run(uint8_t{});
  return mask.element_size() == 4 ? run(int32_t{}) : run(int64_t{});
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) {
  m.impl("route", TORCH_BOX(&route_cuda));
  m.impl("route_mask", TORCH_BOX(&route_mask_cuda));
}

}  // namespace brt
