// Rows of each path times its weight.
//
// R rows, P paths, I features in (summed over), O features out. A block makes one tile of rows of one path; the grid
// has the most tiles that any loads can need, and those that find no rows end at once. Rows past the last offset are
// a path of zeros.
//
// Two kernels: tensor cores (mma.sync, cp.async in kStages stages) for halves whose rows are whole 16-byte pieces, and
// plain multiply-adds in float32 for the rest.
#include "grouped_gemm.cuh"

namespace brt {
namespace {

__device__ inline float activate(float x, Act act) {
  switch (act) {
    case Act::kRelu: return x > 0.0f || x != x ? x : 0.0f;
    case Act::kGelu: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Act::kGeluTanh: return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Act::kSilu: return x / (1.0f + __expf(-x));
    default: return x;
  }
}

struct Tile {
  int path;  // num_paths: the rows past the last offset; -1: no tile
  int64_t first, last;
};

// The tile-th tile of kRows rows; by the first warp, for the block.
template <int kRows>
__device__ Tile find_tile(const int64_t* offsets, int num_paths, int64_t num_rows, int64_t tile) {
  __shared__ Tile found;
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    if (lane == 0) found = Tile{-1, 0, 0};
    __syncwarp();
    int64_t before = 0;
    for (int first = 0; first <= num_paths; first += 32) {
      const int p = first + lane;
      int64_t begin = 0, end = 0;
      if (p <= num_paths) {
        begin = min(max(offsets[p], int64_t{0}), num_rows);
        end = p == num_paths ? num_rows : min(max(offsets[p + 1], begin), num_rows);
      }
      const int64_t tiles = (end - begin + kRows - 1) / kRows;
      int64_t upto = tiles;
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
      }
      const int64_t start = before + upto - tiles;
      if (tile >= start && tile < start + tiles) {
        const int64_t row = begin + (tile - start) * kRows;
        found = Tile{p, row, min(end, row + kRows)};
      }
      before += __shfl_sync(0xffffffffu, upto, 31);
      if (before > tile) break;
    }
  }
  __syncthreads();
  return found;
}

// Zeros for a tile of rows past the last offset.
template <class T>
__device__ void zero_tile(const GroupedGemm<T>& g, const Tile& tile, int64_t column, int64_t num_columns) {
  const int64_t width = min(num_columns, g.num_out - column), count = (tile.last - tile.first) * width;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    g.out[(tile.first + i / width) * g.num_out + column + i % width] = from_float<T>(0.0f);
  }
}

template <class T>
__device__ int64_t source_row(const GroupedGemm<T>& g, int64_t row) {
  const int64_t cell = g.cell_R ? g.cell_R[row] : row;
  if (cell >= 0 && cell < g.num_x) return cell;
  if (cell != -1 && g.errors) tell(g.errors, Where::kMlpCell, cell, g.num_x, row);
  return -1;
}

// By the last block of the grid, which seldom has a tile.
template <class T>
__device__ void check_offsets_once(const GroupedGemm<T>& g) {
  if (g.errors && blockIdx.x == gridDim.x - 1 && blockIdx.y == 0) {
    check_offsets(g.errors, g.offsets_at, g.offsets, g.num_paths, g.num_rows);
  }
}

// ---- Tensor cores ----

__device__ inline void copy_async(void* shared, const void* global, bool there) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(there ? 16 : 0));
}

__device__ inline void load_matrices(unsigned (&r)[4], const void* shared) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}

template <class T>
__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

constexpr int kStep = 32;   // features in shared memory at a time: 64 bytes, 4 pieces of 16
constexpr int kStages = 4;

// Where piece `piece` of row `row` lies: swizzled so that eight rows of one piece are in different banks.
__device__ inline int piece_at(int row, int piece) { return row * kStep + ((piece ^ ((row >> 1) & 3)) * 8); }

// Row of the weight that row j of a block's tile of B holds. Gated: eight of the gate, then their eight partners.
template <bool kGated>
__device__ int64_t weight_row(int64_t column, int j, int64_t num_out) {
  if (!kGated) return column + j < num_out ? column + j : -1;
  const int64_t o = column + (j / 16) * 8 + j % 8;
  return o < num_out ? o + ((j / 8) % 2) * num_out : -1;
}

template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, bool kGated>
__global__ void __launch_bounds__(kWarpRows* kWarpColumns * 32) tensor_gemm(GroupedGemm<T> g) {
  constexpr int kThreads = kWarpRows * kWarpColumns * 32;
  constexpr int kTileM = kRows / kWarpRows / 16, kTileN = kColumns / kWarpColumns / 8;  // of a warp
  static_assert(kTileM >= 1 && kTileN % 2 == 0, "a warp takes whole 16 x 16 pieces");
  extern __shared__ __align__(128) char shared[];
  T* a_shared = reinterpret_cast<T*>(shared);                   // [kStages][kRows][kStep]
  T* b_shared = a_shared + kStages * kRows * kStep;             // [kStages][kColumns][kStep]
  __shared__ int64_t rows_shared[kRows];

  // 1. Which rows, which columns
  constexpr int kOutColumns = kGated ? kColumns / 2 : kColumns;
  const int64_t column = int64_t{blockIdx.y} * kOutColumns;
  check_offsets_once(g);
  const Tile tile = find_tile<kRows>(g.offsets, g.num_paths, g.num_rows, blockIdx.x);
  if (tile.path < 0) return;
  if (tile.path == g.num_paths) return zero_tile(g, tile, column, kOutColumns);
  for (int i = threadIdx.x; i < kRows; i += kThreads) {
    rows_shared[i] = tile.first + i < tile.last ? source_row(g, tile.first + i) : -1;
  }
  __syncthreads();
  const int64_t weight_rows = g.num_out * (kGated ? 2 : 1);
  const T* weight = g.weight + tile.path * weight_rows * g.num_in;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / kWarpColumns * kTileM * 16, warp_n = warp % kWarpColumns * kTileN * 8;

  // 2. Pieces of 16 bytes that this thread brings, in every step
  const auto bring = [&](int64_t step, int stage) {
    const int64_t k0 = step * kStep;
    T* a = a_shared + stage * kRows * kStep;
    T* b = b_shared + stage * kColumns * kStep;
    for (int i = threadIdx.x; i < kRows * 4; i += kThreads) {
      const int64_t row = rows_shared[i / 4], k = k0 + (i % 4) * 8;
      const bool there = row >= 0 && k < g.num_in;
      copy_async(a + piece_at(i / 4, i % 4), there ? g.x + row * g.num_in + k : g.x, there);
    }
    for (int i = threadIdx.x; i < kColumns * 4; i += kThreads) {
      const int64_t row = weight_row<kGated>(column, i / 4, g.num_out), k = k0 + (i % 4) * 8;
      const bool there = row >= 0 && k < g.num_in;
      copy_async(b + piece_at(i / 4, i % 4), there ? weight + row * g.num_in + k : weight, there);
    }
  };

  // 3. Multiply one stage while later ones arrive
  float sums[kTileM][kTileN][4] = {};
  const int64_t num_steps = (g.num_in + kStep - 1) / kStep;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < num_steps) bring(s, s);
    asm volatile("cp.async.commit_group;\n");
  }
  for (int64_t step = 0; step < num_steps; ++step) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 2));
    __syncthreads();
    const int stage = step % kStages;
    const T* a = a_shared + stage * kRows * kStep;
    const T* b = b_shared + stage * kColumns * kStep;
    if (step + kStages - 1 < num_steps) bring(step + kStages - 1, (step + kStages - 1) % kStages);
    asm volatile("cp.async.commit_group;\n");
#pragma unroll
    for (int half = 0; half < kStep / 16; ++half) {
      unsigned a_regs[kTileM][4];
#pragma unroll
      for (int m = 0; m < kTileM; ++m) {
        load_matrices(a_regs[m], a + piece_at(warp_m + m * 16 + lane % 16, half * 2 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < kTileN; n += 2) {
        unsigned b_regs[4];
        load_matrices(b_regs, b + piece_at(warp_n + n * 8 + lane % 8 + lane / 16 * 8, half * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kTileM; ++m) {
          multiply_add<T>(sums[m][n], a_regs[m], b_regs[0], b_regs[1]);
          multiply_add<T>(sums[m][n + 1], a_regs[m], b_regs[2], b_regs[3]);
        }
      }
    }
  }
  asm volatile("cp.async.wait_group 0;\n");

  // 4. Bias, activation, result
  const T* bias = g.bias ? g.bias + tile.path * weight_rows : nullptr;
#pragma unroll
  for (int m = 0; m < kTileM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = tile.first + warp_m + m * 16 + half * 8 + lane / 4;
      if (row >= tile.last) continue;
#pragma unroll
      for (int n = 0; n < kTileN; n += kGated ? 2 : 1) {
        const int64_t first = column + (kGated ? (warp_n + n * 8) / 2 : warp_n + n * 8) + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int64_t o = first + j;
          if (o >= g.num_out) continue;
          float y = sums[m][n][half * 2 + j] + (bias ? to_float(bias[o]) : 0.0f);
          if (kGated) {
            const float up = sums[m][n + (kGated ? 1 : 0)][half * 2 + j] + (bias ? to_float(bias[g.num_out + o]) : 0.0f);
            y = activate(y, Act::kSilu) * up;
          } else {
            y = activate(y, g.act);
          }
          g.out[row * g.num_out + o] = from_float<T>(y);
        }
      }
    }
  }
}

// ---- Plain multiply-adds ----

template <class T, bool kGated>
__global__ void __launch_bounds__(256) plain_gemm(GroupedGemm<T> g) {
  constexpr int kRows = 64, kColumns = 64, kDepth = 16;
  constexpr int kHalves = kGated ? 2 : 1;
  __shared__ float a_shared[kDepth][kRows + 4];
  __shared__ float b_shared[kHalves][kDepth][kColumns + 4];
  __shared__ int64_t rows_shared[kRows];
  const int64_t column = int64_t{blockIdx.y} * kColumns;
  check_offsets_once(g);
  const Tile tile = find_tile<kRows>(g.offsets, g.num_paths, g.num_rows, blockIdx.x);
  if (tile.path < 0) return;
  if (tile.path == g.num_paths) return zero_tile(g, tile, column, kColumns);
  if (threadIdx.x < kRows) {
    rows_shared[threadIdx.x] = tile.first + threadIdx.x < tile.last ? source_row(g, tile.first + threadIdx.x) : -1;
  }
  __syncthreads();
  const int64_t weight_rows = g.num_out * kHalves;
  const T* weight = g.weight + tile.path * weight_rows * g.num_in;
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sums[kHalves][4][4] = {};
  for (int64_t k0 = 0; k0 < g.num_in; k0 += kDepth) {
    for (int i = threadIdx.x; i < kRows * kDepth; i += 256) {
      const int64_t row = rows_shared[i / kDepth], k = k0 + i % kDepth;
      a_shared[i % kDepth][i / kDepth] = row >= 0 && k < g.num_in ? to_float(g.x[row * g.num_in + k]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kHalves * kColumns * kDepth; i += 256) {
      const int half = i / (kColumns * kDepth), j = i / kDepth % kColumns;
      const int64_t o = column + j, k = k0 + i % kDepth;
      b_shared[half][i % kDepth][j] =
          o < g.num_out && k < g.num_in ? to_float(weight[(half * g.num_out + o) * g.num_in + k]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[4], b[kHalves][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = a_shared[k][ty * 4 + i];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int j = 0; j < 4; ++j) b[h][j] = b_shared[h][k][tx * 4 + j];
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[h][i][j] += a[i] * b[h][j];
        }
      }
    }
    __syncthreads();
  }
  const T* bias = g.bias ? g.bias + tile.path * weight_rows : nullptr;
  for (int i = 0; i < 4; ++i) {
    const int64_t row = tile.first + ty * 4 + i;
    if (row >= tile.last) continue;
    for (int j = 0; j < 4; ++j) {
      const int64_t o = column + tx * 4 + j;
      if (o >= g.num_out) continue;
      float y = sums[0][i][j] + (bias ? to_float(bias[o]) : 0.0f);
      if (kGated) {
        y = activate(y, Act::kSilu) * (sums[kHalves - 1][i][j] + (bias ? to_float(bias[g.num_out + o]) : 0.0f));
      } else {
        y = activate(y, g.act);
      }
      g.out[row * g.num_out + o] = from_float<T>(y);
    }
  }
}

// ---- Choice ----

inline int64_t most_tiles(int64_t num_rows, int num_paths, int rows_of_tile) {
  return num_rows / rows_of_tile + num_paths + 1;
}

template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, bool kGated>
void launch_tensor_gemm(const GroupedGemm<T>& g, cudaStream_t stream) {
  constexpr int kShared = kStages * (kRows + kColumns) * kStep * (int)sizeof(T);
  const auto kernel = tensor_gemm<T, kRows, kColumns, kWarpRows, kWarpColumns, kGated>;
  BRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const dim3 grid(blocks_for(most_tiles(g.num_rows, g.num_paths, kRows), 1),
                  blocks_for(g.num_out, kGated ? kColumns / 2 : kColumns));
  kernel<<<grid, kWarpRows * kWarpColumns * 32, kShared, stream>>>(g);
}

}  // namespace

template <class T, bool kGated>
void launch_grouped_gemm(const GroupedGemm<T>& g, cudaStream_t stream) {
  constexpr int64_t kFewRows = 24;  // rows a path, on average, up to which tiles of 16 rows waste less
  BRT_CHECK(g.num_out <= int64_t{65535} * 32, "at most ", 65535 * 32, " features out, got ", g.num_out);
  if constexpr (sizeof(T) == 2) {
    if (g.num_in % 8 == 0 && g.num_in > 0 && aligned16(g.x) && aligned16(g.weight)) {
      if (g.num_rows <= kFewRows * g.num_paths) {
        launch_tensor_gemm<T, 16, 64, 1, 4, kGated>(g, stream);
      } else {
        launch_tensor_gemm<T, 128, 128, 2, 4, kGated>(g, stream);
      }
      BRT_LAUNCHED();
      return;
    }
  }
  const dim3 grid(blocks_for(most_tiles(g.num_rows, g.num_paths, 64), 1), blocks_for(g.num_out, 64));
  plain_gemm<T, kGated><<<grid, 256, 0, stream>>>(g);
  BRT_LAUNCHED();
}

template void launch_grouped_gemm<float, false>(const GroupedGemm<float>&, cudaStream_t);
template void launch_grouped_gemm<float, true>(const GroupedGemm<float>&, cudaStream_t);
template void launch_grouped_gemm<__half, false>(const GroupedGemm<__half>&, cudaStream_t);
template void launch_grouped_gemm<__half, true>(const GroupedGemm<__half>&, cudaStream_t);
template void launch_grouped_gemm<__nv_bfloat16, false>(const GroupedGemm<__nv_bfloat16>&, cudaStream_t);
template void launch_grouped_gemm<__nv_bfloat16, true>(const GroupedGemm<__nv_bfloat16>&, cudaStream_t);

}  // namespace brt
