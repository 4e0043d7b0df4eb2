// grouped_outer: out[p] = y_p.T @ x_p over the rows of path p, the gradient of a grouped linear layer's weight.
// R rows (summed over), P paths, O rows and I columns of a result.
//
// A block makes one tile of one path's result and sums over that path's rows in their order, so results are the same
// from run to run. A path without rows gets zeros.
//
// Two kernels: tensor cores (mma.sync, cp.async in kStages stages) for halves whose rows are whole 16-byte pieces, and
// plain multiply-adds in float32 for the rest.
#include "device_error.cuh"

#include <type_traits>

namespace brt {
namespace {

template <class T>
struct Outer {
  const T *y, *x;          // [R, O], [R, I]
  const int64_t* offsets;  // [P + 1]
  T* out;                  // [P, O, I]
  int64_t num_rows, num_y, num_x;
  int num_paths;
  unsigned tiles_y, tiles_x;  // of a result
  ErrorWord* errors;
};

struct Tile {
  unsigned path, y, x;  // which of the results' tiles
  int64_t begin, end;   // rows that are summed
};

// The tiles of a path are consecutive, those along a row of the result first: they share what they read.
template <class T>
__device__ Tile find_tile(const Outer<T>& o) {
  const unsigned tiles = o.tiles_y * o.tiles_x, tile = blockIdx.x % tiles, p = blockIdx.x / tiles;
  const int64_t first = o.offsets[p], last = o.offsets[p + 1];
  if (tile == 0 && threadIdx.x == 0) {
    if (p == 0 && (first < 0 || first > o.num_rows)) tell(o.errors, Where::kOuterOffsets, first, o.num_rows, 0);
    if (last < first || last > o.num_rows) tell(o.errors, Where::kOuterOffsets, last, o.num_rows, p + 1);
  }
  const int64_t begin = min(max(first, int64_t{0}), o.num_rows);
  return {p, tile / o.tiles_x, tile % o.tiles_x, begin, min(max(last, begin), o.num_rows)};
}

// ---- Tensor cores ----

constexpr int kStages = 4;
constexpr int kStep = 32;  // rows in shared memory at a time

__device__ inline void copy_async(void* shared, const void* global, bool there) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(global), "r"(there ? 16 : 0));
}

// Transposed: rows are summed over, so they must be the products' inner index.
__device__ inline void load_matrices(unsigned (&r)[4], const void* shared) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}

template <class T>
__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (std::is_same_v<T, __half>) {
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

// Where piece `piece` of row `row` lies: in blocks of kStep rows and 64 columns, eight rows of one piece in different
// banks.
__device__ inline int piece_at(int row, int piece) {
  return piece / 8 * kStep * 64 + row * 64 + ((piece & 7) ^ (row & 7)) * 8;
}

// Brings kStep rows of a matrix at a time, of kColumns columns from `column` on; zeros outside. A thread brings the
// same piece of every kPitch-th row.
template <class T, int kColumns, int kThreads>
class Source {
 public:
  __device__ Source(const T* matrix, int64_t begin, int64_t end, int64_t column, int64_t num_columns)
      : matrix_(matrix),
        from_(matrix + (begin + threadIdx.x / kPieces) * num_columns + column + threadIdx.x % kPieces * 8),
        pitch_(kPitch * num_columns),
        // What is left to this thread: nothing where its columns are outside
        left_(column + threadIdx.x % kPieces * 8 < num_columns ? end - begin - threadIdx.x / kPieces : 0) {}

  __device__ void bring(T* to) {
    T* piece = to + piece_at(threadIdx.x / kPieces, threadIdx.x % kPieces);
#pragma unroll
    for (int i = 0; i < kStep / kPitch; ++i) {
      const bool there = i * kPitch < left_;
      copy_async(piece + i * kPitch * 64, there ? from_ : matrix_, there);
      from_ += pitch_;
    }
    left_ -= kStep;
  }

 private:
  static constexpr int kPieces = kColumns / 8, kPitch = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kPitch % 8 == 0 && kStep % kPitch == 0, "pieces stay in their banks");
  const T *matrix_, *from_;
  int64_t pitch_, left_;
};

// A tile of the result, from rows of kColumns + 8, in whole lines.
template <class T, int kRows, int kColumns, int kThreads>
__device__ void write_tile(const Outer<T>& o, const Tile& tile, const T* from) {
  T* out = o.out + int64_t{tile.path} * o.num_y * o.num_x;
  for (int i = threadIdx.x; i < kRows * kColumns / 8; i += kThreads) {
    const int row = i / (kColumns / 8), piece = i % (kColumns / 8);
    const int64_t to_row = int64_t{tile.y} * kRows + row, to_column = int64_t{tile.x} * kColumns + piece * 8;
    if (to_row < o.num_y && to_column < o.num_x) {
      // Streamed: nobody reads the result soon, and it is larger than what is read
      __stcs(reinterpret_cast<uint4*>(out + to_row * o.num_x + to_column),
             *reinterpret_cast<const uint4*>(from + row * (kColumns + 8) + piece * 8));
    }
  }
}

// A warp's share of a tile is square, which reads the least from shared memory.
template <class T, int kRows, int kColumns, int kWarpRows, int kWarpColumns, int kBlocks>
__global__ void __launch_bounds__(kWarpRows* kWarpColumns * 32, kBlocks) tensor_outer(Outer<T> o) {
  constexpr int kThreads = kWarpRows * kWarpColumns * 32;
  constexpr int kTileM = kRows / kWarpRows / 16, kTileN = kColumns / kWarpColumns / 8;  // of a warp
  static_assert(kTileM >= 1 && kTileN % 2 == 0, "a warp takes whole 16 x 16 pieces");
  extern __shared__ __align__(128) char shared[];
  T* y_shared = reinterpret_cast<T*>(shared);        // [kStages][kStep][kRows]
  T* x_shared = y_shared + kStages * kStep * kRows;  // [kStages][kStep][kColumns]
  const Tile tile = find_tile(o);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / kWarpColumns * kTileM * 16, warp_n = warp % kWarpColumns * kTileN * 8;

  // 1. Multiply one stage while later ones arrive
  float sums[kTileM][kTileN][4] = {};
  const int num_steps = (int)((tile.end - tile.begin + kStep - 1) / kStep);
  Source<T, kRows, kThreads> y_source(o.y, tile.begin, tile.end, int64_t{tile.y} * kRows, o.num_y);
  Source<T, kColumns, kThreads> x_source(o.x, tile.begin, tile.end, int64_t{tile.x} * kColumns, o.num_x);
  const auto bring = [&](int stage) {
    y_source.bring(y_shared + stage * kStep * kRows);
    x_source.bring(x_shared + stage * kStep * kColumns);
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < num_steps) bring(s);
    asm volatile("cp.async.commit_group;\n");
  }
  for (int step = 0; step < num_steps; ++step) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kStages - 2));
    __syncthreads();
    const int stage = step % kStages;
    const T* y = y_shared + stage * kStep * kRows;
    const T* x = x_shared + stage * kStep * kColumns;
    if (step + kStages - 1 < num_steps) bring((step + kStages - 1) % kStages);
    asm volatile("cp.async.commit_group;\n");
#pragma unroll
    for (int half = 0; half < kStep / 16; ++half) {
      unsigned a_regs[kTileM][4];
#pragma unroll
      for (int m = 0; m < kTileM; ++m) {
        // Rows 0-7, 0-7, 8-15, 8-15; columns 0-7, 8-15, 0-7, 8-15
        load_matrices(a_regs[m], y + piece_at(half * 16 + lane / 16 * 8 + lane % 8,
                                              (warp_m + m * 16) / 8 + lane / 8 % 2));
      }
#pragma unroll
      for (int n = 0; n < kTileN; n += 2) {
        // Rows 0-7, 8-15, 0-7, 8-15; columns 0-7, 0-7, 8-15, 8-15
        unsigned b_regs[4];
        load_matrices(b_regs, x + piece_at(half * 16 + lane / 8 % 2 * 8 + lane % 8,
                                           (warp_n + n * 8) / 8 + lane / 16));
#pragma unroll
        for (int m = 0; m < kTileM; ++m) {
          multiply_add<T>(sums[m][n], a_regs[m], b_regs[0], b_regs[1]);
          multiply_add<T>(sums[m][n + 1], a_regs[m], b_regs[2], b_regs[3]);
        }
      }
    }
  }
  asm volatile("cp.async.wait_group 0;\n");
  __syncthreads();

  // 2. Through shared memory, so that the result is written in whole lines
  constexpr int kPitch = kColumns + 8;  // rows of a fragment in different banks
  static_assert(kRows * kPitch <= kStages * kStep * (kRows + kColumns), "the result fits where the stages were");
  T* tile_shared = y_shared;
#pragma unroll
  for (int m = 0; m < kTileM; ++m) {
#pragma unroll
    for (int n = 0; n < kTileN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* to = tile_shared + (warp_m + m * 16 + half * 8 + lane / 4) * kPitch + warp_n + n * 8 + lane % 4 * 2;
        *reinterpret_cast<Pack<T, 2>*>(to) =
            Pack<T, 2>{from_float<T>(sums[m][n][half * 2]), from_float<T>(sums[m][n][half * 2 + 1])};
      }
    }
  }
  __syncthreads();
  write_tile<T, kRows, kColumns, kThreads>(o, tile, tile_shared);
}

// ---- Plain multiply-adds ----

template <class T>
__global__ void __launch_bounds__(256) plain_outer(Outer<T> o) {
  constexpr int kRows = 64, kColumns = 64, kDepth = 16;
  __shared__ float y_shared[kDepth][kRows + 4];
  __shared__ float x_shared[kDepth][kColumns + 4];
  const Tile tile = find_tile(o);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float sums[4][4] = {};
  for (int64_t first = tile.begin; first < tile.end; first += kDepth) {
    for (int i = threadIdx.x; i < kDepth * kRows; i += 256) {
      const int64_t row = first + i / kRows, at = int64_t{tile.y} * kRows + i % kRows;
      y_shared[i / kRows][i % kRows] = row < tile.end && at < o.num_y ? to_float(o.y[row * o.num_y + at]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kDepth * kColumns; i += 256) {
      const int64_t row = first + i / kColumns, at = int64_t{tile.x} * kColumns + i % kColumns;
      x_shared[i / kColumns][i % kColumns] = row < tile.end && at < o.num_x ? to_float(o.x[row * o.num_x + at]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = y_shared[k][ty * 4 + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = x_shared[k][tx * 4 + j];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
      }
    }
    __syncthreads();
  }
  T* out = o.out + int64_t{tile.path} * o.num_y * o.num_x;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int64_t row = int64_t{tile.y} * kRows + ty * 4 + i, column = int64_t{tile.x} * kColumns + tx * 4 + j;
      if (row < o.num_y && column < o.num_x) out[row * o.num_x + column] = from_float<T>(sums[i][j]);
    }
  }
}

// ---- Choice ----

template <class T>
unsigned cut(Outer<T>& o, int num_tile_rows, int num_tile_columns) {
  o.tiles_y = blocks_for(o.num_y, num_tile_rows);
  o.tiles_x = blocks_for(o.num_x, num_tile_columns);
  return blocks_for(checked_size(checked_size(o.tiles_y, o.tiles_x, 0), o.num_paths, 0), 1);
}

template <class T>
void launch_outer(Outer<T> o, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (o.num_y % 8 == 0 && o.num_x % 8 == 0 && aligned16(o.y) && aligned16(o.x) && aligned16(o.out)) {
      constexpr int kRows = 128, kColumns = 128, kShared = kStages * kStep * (kRows + kColumns) * (int)sizeof(T);
      const auto kernel = tensor_outer<T, kRows, kColumns, 2, 2, 2>;
      BRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
      const unsigned blocks = cut(o, kRows, kColumns);
      kernel<<<blocks, 128, kShared, stream>>>(o);
      BRT_LAUNCHED();
      return;
    }
  }
  const unsigned blocks = cut(o, 64, 64);
  plain_outer<T><<<blocks, 256, 0, stream>>>(o);
  BRT_LAUNCHED();
}

}  // namespace

Tensor grouped_outer_cuda(const Tensor& y, const Tensor& x, const Tensor& offsets) {
  BRT_CHECK(y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "y_RO and x_RI must be 2-D with equal rows, got ",
            shape_of(y), " and ", shape_of(x));
  check_real(x, "x_RI");
  BRT_CHECK(y.scalar_type() == x.scalar_type(), "y_RO must be ", dtype_name(x.scalar_type()), " as x, got ",
            dtype_name(y.scalar_type()));
  check_index(offsets, "offsets_P1", 1);
  check_device(y, "y_RO", x);
  check_device(offsets, "offsets_P1", x);
  BRT_CHECK(offsets.size(0) >= 1 && offsets.size(0) < (1 << 30), "offsets_P1 must have at least one entry");
  const OnDevice device(x);
  const int64_t num_paths = offsets.size(0) - 1, num_y = y.size(1), num_x = x.size(1);
  const Tensor y_RO = as_contiguous(y), x_RI = as_contiguous(x), offsets_P1 = as_int64(offsets);
  Tensor out_POI = new_empty(x_RI, {num_paths, num_y, num_x}, x.scalar_type());
  if (checked_size(num_paths, checked_size(num_y, num_x, 0), 0) == 0) return out_POI;
  with_real(x, [&](auto zero) {
    using T = decltype(zero);
    launch_outer(Outer<T>{data_of<T>(y_RO), data_of<T>(x_RI), data_of<int64_t>(offsets_P1), mutable_data_of<T>(out_POI),
                          x.size(0), num_y, num_x, (int)num_paths, 0, 0, error_word()},
                 device.stream());
  });
  return out_POI;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("grouped_outer", TORCH_BOX(&grouped_outer_cuda)); }

}  // namespace brt
