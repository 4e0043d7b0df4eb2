// One cell through all steps of its branch, by one block: images in shared memory, convolutions on tensor cores.
//
// A warp makes a tile of 4 rows of 16 pixels, for up to three times eight output channels. Pixels are the rows of a
// matrix product, output channels its columns; it sums over taps, a tap being one unit (16 bytes of channels) of the
// pixel in one column of the kernel, two at a time. A tap that is loaded serves up to three output rows, one a row of
// the kernel. Weights come piece by piece, the next one while this one is used.
//
// NOTES: float32 is the sum of three products of tf32 halves (high * high, high * low, low * high), taken from zero
// and added to the sums in float32, because the tensor cores round sums towards zero: without that, the result of 80
// steps is ten times further off. An infinite input gives NaN.
#pragma once

#include "conv_chain_plan.cuh"

#include <type_traits>

namespace brt {
namespace {

template <class T>
struct ChainCall {
  const T* x;              // [R, C, H, W]
  T* out;                  // [R, C', H', W']
  const int64_t* offsets;  // [P + 1]
  const char* packed;
  char* scratch;           // scratch_bytes for each block
  int64_t num_rows, x_numel, out_numel, scratch_bytes;  // numel: of one row
  int num_paths, piece_bytes;
  int channels, height, width;  // C, H, W
};

// ---- Loads ----

__device__ inline void bring(char* shared, const char* global, int bytes) {
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(to), "l"(global + i));
  }
}

__device__ inline void load_units(unsigned (&r)[4], unsigned shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared));
}

__device__ inline unsigned load_word(const char* p) { return *reinterpret_cast<const unsigned*>(p); }

// Two neighbouring channels in shared memory, through addresses of 32 bits. A ReLU keeps NaN.
template <class T>
struct SharedPair;

template <>
struct SharedPair<float> {
  static __device__ __forceinline__ float2 load(unsigned at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(v.x), "=f"(v.y) : "r"(at));
    return v;
  }
  template <bool kRelu>
  static __device__ __forceinline__ void store(unsigned at, float x, float y) {
    if (kRelu) {
      asm("max.NaN.f32 %0, %0, 0f00000000;\n" : "+f"(x));
      asm("max.NaN.f32 %0, %0, 0f00000000;\n" : "+f"(y));
    }
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};\n" ::"r"(at), "f"(x), "f"(y));
  }
};

#define BRT_SHARED_PAIR(T, name)                                                                            \
  template <>                                                                                               \
  struct SharedPair<T> {                                                                                    \
    static __device__ __forceinline__ float2 load(unsigned at) {                                            \
      Pack<T, 2> v;                                                                                         \
      asm volatile("ld.shared.b32 %0, [%1];\n" : "=r"(reinterpret_cast<unsigned&>(v)) : "r"(at));           \
      return make_float2(to_float(v.v[0]), to_float(v.v[1]));                                               \
    }                                                                                                       \
    template <bool kRelu>                                                                                   \
    static __device__ __forceinline__ void store(unsigned at, float x, float y) {                           \
      unsigned both;                                                                                        \
      if (kRelu) {                                                                                          \
        asm("cvt.rn.relu." name "x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(y), "f"(x));                      \
      } else {                                                                                              \
        asm("cvt.rn." name "x2.f32 %0, %1, %2;\n" : "=r"(both) : "f"(y), "f"(x));                           \
      }                                                                                                     \
      asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(at), "r"(both));                                       \
    }                                                                                                       \
  };
BRT_SHARED_PAIR(__half, "f16")
BRT_SHARED_PAIR(__nv_bfloat16, "bf16")
#undef BRT_SHARED_PAIR

// ---- Products: 16 pixels and two taps (kBoth; else one) by 8 channels ----

#define BRT_MMA_BOTH(shape, types)                                                                               \
  asm("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "      \
      "{%10, %11, %12, %13};\n"                                                                                  \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),       \
        "f"(c[3]))
#define BRT_MMA_ONE(shape, types)                                                                                \
  asm("mma.sync.aligned." shape ".row.col.f32." types ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "                  \
      "{%7, %8, %9, %10};\n"                                                                                     \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]))

template <class T, bool kBoth>
__device__ __forceinline__ void product(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                        const float (&c)[4]) {
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (kBoth) {
      BRT_MMA_BOTH("m16n8k8", "tf32.tf32");
    } else {
      BRT_MMA_ONE("m16n8k4", "tf32.tf32");
    }
  } else if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kBoth) {
      BRT_MMA_BOTH("m16n8k16", "f16.f16");
    } else {
      BRT_MMA_ONE("m16n8k8", "f16.f16");
    }
  } else {
    if constexpr (kBoth) {
      BRT_MMA_BOTH("m16n8k16", "bf16.bf16");
    } else {
      BRT_MMA_ONE("m16n8k8", "bf16.bf16");
    }
  }
}

// What is multiplied: words of pixels or of weights, for float32 in two halves.
template <class T, int kWords>
struct Factor {
  unsigned word[kWords];
  __device__ __forceinline__ void split() {}
};

template <int kWords>
struct Factor<float, kWords> {
  unsigned word[kWords], low[kWords];
  // The nearest tf32, and the nearest to the rest. The tensor cores ignore the last 13 bits.
  __device__ __forceinline__ void split() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const float whole = __uint_as_float(word[i]);
      word[i] = (word[i] + 0x1000u) & 0xffffe000u;
      low[i] = __float_as_uint(whole - __uint_as_float(word[i])) + 0x1000u;
    }
  }
};

// One row of float32: small products first, in tensor cores from zero, then to the sums.
template <int kKernel, int kTiles, bool kBoth>
__device__ __forceinline__ void multiply_row(float (&sums)[kTiles][4], const Factor<float, 4> (&a)[kKernel],
                                             const Factor<float, 2> (&b)[kKernel][kTiles], int first) {
  float part[kTiles][4] = {};
#pragma unroll
  for (int step = 0; step < 3 * kKernel; ++step) {
    const int ky = step % kKernel;
    const Factor<float, 4>& row = a[(first + ky) % kKernel];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      product<float, kBoth>(part[n], step < kKernel ? row.low : row.word,
                            step / kKernel == 1 ? b[ky][n].low : b[ky][n].word, part[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[n][i] += part[n][i];
  }
}

// ---- One step ----

// sums of a tile of rows y0.., pixels x0... `kScratch`: the image is in global memory.
template <class T, int kTiles, int kKernel, bool kScratch>
__device__ __forceinline__ void convolve(float (&sums)[kTileRows][kTiles][4], const Piece& piece, const char* data,
                                         const char* image, int y0, int x0) {
  constexpr int kInRows = kTileRows + kKernel - 1;
  const int lane = threadIdx.x % 32;
  // 1. Where rows and this lane's pixels begin. Past the image is the last one again: its sums are not kept
  int rows[kInRows];
#pragma unroll
  for (int r = 0; r < kInRows; ++r) {
    rows[r] = min(y0 + r + (kKernel == 1), piece.height + 1) * (piece.width + 2) * kUnitBytes;
  }
  const int last = piece.width - 1;
  const unsigned matrix = kScratch ? 0u : static_cast<unsigned>(__cvta_generic_to_shared(image)) +
                                              min(x0 + lane % 16, last) * kUnitBytes;
  const char* first = image + min(x0 + lane / 4, last) * kUnitBytes + lane % 4 * 4;
  const char* second = image + min(x0 + lane / 4 + 8, last) * kUnitBytes + lane % 4 * 4;
  const int2* taps = reinterpret_cast<const int2*>(data + taps_at(piece));
  const uint2* weights = reinterpret_cast<const uint2*>(data + weights_at(piece)) + lane;

  // 2. Two taps, or the last one
  const auto add_taps = [&](int pair, auto both) {
    constexpr bool kBoth = decltype(both)::value;
    const int2 tap = taps[pair];
    Factor<T, 2> b[kKernel][kTiles];
#pragma unroll
    for (int ky = 0; ky < kKernel; ++ky) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint2 words = weights[((pair * kKernel + ky) * kTiles + n) * 32];
        b[ky][n].word[0] = words.x;
        b[ky][n].word[1] = words.y;
        b[ky][n].split();
      }
    }
    Factor<T, 4> a[kKernel];  // the rows that an output row reads
#pragma unroll
    for (int r = 0; r < kInRows; ++r) {
      unsigned(&word)[4] = a[r % kKernel].word;
      if constexpr (kScratch) {
        word[0] = load_word(first + rows[r] + tap.x);
        word[1] = load_word(second + rows[r] + tap.x);
        word[2] = load_word(first + rows[r] + tap.y);
        word[3] = load_word(second + rows[r] + tap.y);
      } else {
        load_units(word, matrix + rows[r] + (lane < 16 ? tap.x : tap.y));
      }
      a[r % kKernel].split();
      if constexpr (std::is_same_v<T, float>) {
        if (r >= kKernel - 1) multiply_row<kKernel, kTiles, kBoth>(sums[r - kKernel + 1], a, b, r - kKernel + 1);
      } else {
#pragma unroll
        for (int ky = 0; ky < kKernel; ++ky) {
          if (r - ky < 0 || r - ky >= kTileRows) continue;
#pragma unroll
          for (int n = 0; n < kTiles; ++n) {
            product<T, kBoth>(sums[r - ky][n], a[r % kKernel].word, b[ky][n].word, sums[r - ky][n]);
          }
        }
      }
    }
  };
#pragma unroll 1
  for (int pair = 0; pair < piece.num_taps / 2; ++pair) add_taps(pair, std::true_type{});
  if (piece.num_taps % 2) add_taps(piece.num_taps / 2, std::false_type{});
}

__device__ inline char* image_at(Place place, char* images, char* scratch) {
  return (place.space == Space::kShared ? images : scratch) + place.at;
}

// From the sums of a whole tile to an image in shared memory: a ReLU and nothing else, or a scaled addition.
template <class T, int kTiles, bool kAdd>
__device__ __forceinline__ void finish_whole(const float (&sums)[kTileRows][kTiles][4], const Piece& piece,
                                             const char* data, unsigned add, unsigned image, int y0, int x0) {
  constexpr int kUnitsOfTile = kTileChannels / kUnit<T>;
  const int lane = threadIdx.x % 32, pair = lane % 4 * 2;
  const int row_bytes = (piece.width + 2) * kUnitBytes, plane = (piece.height + 2) * row_bytes;
  const int unit = (piece.first_channel + pair) / kUnit<T>;
  const unsigned at = unit * plane + (y0 + 1) * row_bytes + (x0 + lane / 4 + 1) * kUnitBytes +
      pair % kUnit<T> * (int)sizeof(T);
  const float scale = piece.scale;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (unit + n * kUnitsOfTile >= piece.dst_units) continue;
    const float2 bias = *reinterpret_cast<const float2*>(data + bias_at(piece) + (n * kTileChannels + pair) * 4);
    float2 other[kTileRows][2];
    if (kAdd) {
#pragma unroll
      for (int i = 0; i < 2 * kTileRows; ++i) {
        other[i / 2][i % 2] = SharedPair<T>::load(add + at + n * kUnitsOfTile * plane + i / 2 * row_bytes +
                                                  i % 2 * 8 * kUnitBytes);
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTileRows; ++i) {
      const unsigned to = image + at + n * kUnitsOfTile * plane + i / 2 * row_bytes + i % 2 * 8 * kUnitBytes;
      const float v0 = sums[i / 2][n][i % 2 * 2] + bias.x, v1 = sums[i / 2][n][i % 2 * 2 + 1] + bias.y;
      if (kAdd) {
        const float2 o = other[i / 2][i % 2];
        SharedPair<T>::template store<false>(to, v0 * scale + o.x, v1 * scale + o.y);
      } else {
        SharedPair<T>::template store<true>(to, v0, v1);
      }
    }
  }
}

__device__ inline float relu(float y) { return y < 0.0f ? 0.0f : y; }

// From sums [tile][row][half][two channels] in memory to an image of any kind, or the result. Not inlined: it is rare,
// and would take registers from the rest. Without an activation the slope is 1, with a ReLU 0.
template <class T>
__device__ __noinline__ void finish_any(const float* sums, const Piece& piece, const char* data, const char* add,
                                        char* image, T* result, int y0, int x0) {
  const int lane = threadIdx.x % 32;
  const int height = piece.height, width = piece.width, shuffle = piece.shuffle;
#pragma unroll 1
  for (int i = 0; i < piece.tiles * kTileRows * 4; ++i) {
    const int n = i / (kTileRows * 4), y = y0 + i / 4 % kTileRows, x = x0 + lane / 4 + i / 2 % 2 * 8;
    const int mine = n * kTileChannels + lane % 4 * 2 + i % 2, channel = piece.first_channel + mine;
    if (x >= width || y >= height) continue;
    // 1. The value
    float v = sums[i] + reinterpret_cast<const float*>(data + bias_at(piece))[mine];
    v = (v > 0.0f ? v : v * reinterpret_cast<const float*>(data + slope_at(piece))[mine]) * piece.scale;
    const int unit = channel / kUnit<T>, inside = channel % kUnit<T>;
    const int at = ((unit * (height + 2) + y + 1) * (width + 2) + x + 1) * kUnitBytes;
    const bool kept = unit < piece.dst_units;  // in an image that is not shuffled
    if (add != nullptr && kept) v += to_float(reinterpret_cast<const T*>(add + at)[inside]);
    const T made = from_float<T>(piece.post ? relu(v) : v);
    // 2. Its place
    if (image != nullptr && shuffle == 1) {
      if (kept) reinterpret_cast<T*>(image + at)[inside] = made;
    } else if (channel < piece.out_channels) {
      const int c = channel / (shuffle * shuffle);
      const int big_y = y * shuffle + channel / shuffle % shuffle, big_x = x * shuffle + channel % shuffle;
      if (image == nullptr) {
        result[(int64_t{c} * height * shuffle + big_y) * (width * shuffle) + big_x] = made;
      } else {
        const int row = c / kUnit<T> * (height * shuffle + 2) + big_y + 1;
        reinterpret_cast<T*>(image + (row * (width * shuffle + 2) + big_x + 1) * kUnitBytes)[c % kUnit<T>] = made;
      }
    }
  }
}

// The first tile of this warp; worked out anew only where the number of tiles in a row changes.
struct Corner {
  int along = 0, y0 = 0, x0 = 0;

  __device__ __forceinline__ void fit(int tiles_along) {
    if (tiles_along == along) return;
    along = tiles_along;
    y0 = threadIdx.x / 32 / along * kTileRows;
    x0 = threadIdx.x / 32 % along * kTilePixels;
  }
};

template <class T, int kTiles>
__device__ __forceinline__ void run_piece(const Piece& piece, const char* data, const Corner& corner, char* images,
                                          char* scratch, T* result) {
  const char* src = image_at(piece.src, images, scratch);
  const bool from_scratch = piece.src.space == Space::kScratch;
  int y0 = corner.y0, x0 = corner.x0;
  for (int tile = threadIdx.x / 32; tile < piece.num_tiles;) {
    // 1. Sums
    float sums[kTileRows][kTiles][4] = {};
    __syncwarp();  // the tile before may have left some lanes behind
    if (piece.kernel == 3) {
      if (from_scratch) {
        convolve<T, kTiles, 3, true>(sums, piece, data, src, y0, x0);
      } else {
        convolve<T, kTiles, 3, false>(sums, piece, data, src, y0, x0);
      }
    } else if (from_scratch) {
      convolve<T, kTiles, 1, true>(sums, piece, data, src, y0, x0);
    } else {
      convolve<T, kTiles, 1, false>(sums, piece, data, src, y0, x0);
    }
    // 2. What becomes of them
    const bool whole = y0 + kTileRows <= piece.height && x0 + kTilePixels <= piece.width;
    const unsigned base = static_cast<unsigned>(__cvta_generic_to_shared(images));
    if (whole && piece.finish == kFinishRelu) {
      finish_whole<T, kTiles, false>(sums, piece, data, 0, base + piece.dst.at, y0, x0);
    } else if (whole && piece.finish == kFinishAdd) {
      finish_whole<T, kTiles, true>(sums, piece, data, base + piece.add.at, base + piece.dst.at, y0, x0);
    } else {
      const char* add = piece.add.space == Space::kNowhere ? nullptr : image_at(piece.add, images, scratch);
      char* dst = piece.dst.space == Space::kResult ? nullptr : image_at(piece.dst, images, scratch);
      float held[kTiles][kTileRows][4];
#pragma unroll
      for (int i = 0; i < kTiles * kTileRows * 4; ++i) {
        held[i / (kTileRows * 4)][i / 4 % kTileRows][i % 4] = sums[i / 4 % kTileRows][i / (kTileRows * 4)][i % 4];
      }
      finish_any<T>(&held[0][0][0], piece, data, add, dst, result, y0, x0);
    }
    // 3. The next one of this warp
    tile += blockDim.x / 32;
    if (tile < piece.num_tiles) {
      y0 = tile / piece.tiles_along * kTileRows;
      x0 = tile % piece.tiles_along * kTilePixels;
    }
  }
}

// ---- Images ----

template <class T>
__device__ void load_cell(char* image, const T* x, const ChainCall<T>& call) {
  const int along = call.width + 2, down = call.height + 2;
  const int units = (call.channels + kUnit<T> - 1) / kUnit<T>;
  for (int i = threadIdx.x; i < units * down * along; i += blockDim.x) {
    const int column = i % along - 1, row = i / along % down - 1, first = i / (along * down) * kUnit<T>;
    const bool there = column >= 0 && column < call.width && row >= 0 && row < call.height;
    Pack<T, kUnit<T>> unit;
#pragma unroll
    for (int c = 0; c < kUnit<T>; ++c) {
      unit.v[c] = there && first + c < call.channels
          ? x[(int64_t{first + c} * call.height + row) * call.width + column] : from_float<T>(0.0f);
    }
    reinterpret_cast<Pack<T, kUnit<T>>*>(image)[i] = unit;
  }
}

__device__ inline void clear_image(char* image, const Piece& piece) {
  const int along = piece.width * piece.shuffle + 2, down = piece.height * piece.shuffle + 2;
  for (int i = threadIdx.x; i < piece.dst_units * down * along; i += blockDim.x) {
    const int column = i % along, row = i / along % down;
    const bool border = column == 0 || column == along - 1 || row == 0 || row == down - 1;
    if (border || piece.clear == 2) reinterpret_cast<uint4*>(image)[i] = make_uint4(0, 0, 0, 0);
  }
}

template <class T>
__device__ void zero_row(T* out, int64_t numel) {
  for (int64_t i = threadIdx.x; i < numel; i += blockDim.x) out[i] = from_float<T>(0.0f);
}

// ---- The kernel ----

// The path of a row, -1 = none; for the whole block.
__device__ inline int find_path(const int64_t* offsets, int num_paths, int64_t row) {
  __shared__ int found;
  if (threadIdx.x < 32) {
    int path = -1;
    for (int first = 0; first < num_paths && path < 0; first += 32) {
      const int p = first + threadIdx.x;
      const bool here = p < num_paths && offsets[p] <= row && row < offsets[p + 1];
      const unsigned lanes = __ballot_sync(0xffffffffu, here);
      if (lanes) path = first + __ffs(lanes) - 1;
    }
    if (threadIdx.x == 0) found = path;
  }
  __syncthreads();
  return found;
}

template <class T>
__device__ void run_cell(const ChainCall<T>& call, const Entry& entry, int64_t row, char* shared) {
  char* images = shared + 2 * call.piece_bytes;
  char* scratch = call.scratch + blockIdx.x * call.scratch_bytes;
  const char* from = call.packed + entry.first_at;
  int bytes = entry.first_bytes;
  Corner corner;
  bring(shared, from, bytes);
  load_cell(image_at(entry.cell, images, scratch), call.x + row * call.x_numel, call);
  for (int turn = 0; bytes > 0; turn ^= 1) {
    // 1. This piece is there, and everyone has done the one before
    asm volatile("cp.async.wait_all;\n" ::: "memory");
    __syncthreads();
    const char* data = shared + turn * call.piece_bytes;
    const Piece& piece = *reinterpret_cast<const Piece*>(data);  // stays there: registers are few
    // 2. The next one takes the place of the one before
    from += bytes;
    bytes = piece.next_bytes;
    if (bytes > 0) bring(shared + (turn ^ 1) * call.piece_bytes, from, bytes);
    // 3. Compute
    if (piece.clear) {
      clear_image(image_at(piece.dst, images, scratch), piece);
      __syncthreads();
    }
    T* result = call.out + row * call.out_numel;
    corner.fit(piece.tiles_along);
    if (piece.tiles == 1) {
      run_piece<T, 1>(piece, data, corner, images, scratch, result);
    } else if (piece.tiles == 2) {
      run_piece<T, 2>(piece, data, corner, images, scratch, result);
    } else if constexpr (sizeof(T) == 2) {
      run_piece<T, 3>(piece, data, corner, images, scratch, result);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMostWarps * 32, 1) run_chain(const ChainCall<T> call) {
  extern __shared__ __align__(16) char chain_shared[];
  for (int64_t row = blockIdx.x; row < call.num_rows; row += gridDim.x) {
    const int path = find_path(call.offsets, call.num_paths, row);
    if (path < 0) {
      zero_row(call.out + row * call.out_numel, call.out_numel);
    } else {
      run_cell(call, reinterpret_cast<const Entry*>(call.packed)[path], row, chain_shared);
    }
    __syncthreads();  // before the next row's path and images take their places
  }
}

// ---- Packing ----

__device__ inline float param_at(const void* param, int type, int64_t i) {
  if (type == 1) return __half2float(static_cast<const __half*>(param)[i]);
  if (type == 2) return __bfloat162float(static_cast<const __nv_bfloat16*>(param)[i]);
  return static_cast<const float*>(param)[i];
}

// One piece a block.
template <class T>
__global__ void __launch_bounds__(128) pack_pieces(const PieceJob* jobs, char* packed) {
  const PieceJob job = jobs[blockIdx.x];
  const Piece& piece = job.piece;
  char* data = packed + job.to;
  const int planes = piece.num_taps / piece.kernel;
  // 1. What the kernel has to know
  if (threadIdx.x == 0) *reinterpret_cast<Piece*>(data) = piece;
  // 2. Taps, in bytes from the pixel at the upper left: column by column, plane by plane
  int* taps = reinterpret_cast<int*>(data + taps_at(piece));
  for (int i = threadIdx.x; i < (bias_at(piece) - taps_at(piece)) / 4; i += blockDim.x) {
    const int tap = min(i, piece.num_taps - 1), column = piece.kernel == 1 ? 1 : tap / planes;
    taps[i] = (tap % planes * (piece.height + 2) * (piece.width + 2) + column) * kUnitBytes;
  }
  // 3. Bias and slope, zeros for the channels that fill up the last tile
  float* bias = reinterpret_cast<float*>(data + bias_at(piece));
  float* slope = reinterpret_cast<float*>(data + slope_at(piece));
  for (int i = threadIdx.x; i < piece.tiles * kTileChannels; i += blockDim.x) {
    const int o = piece.first_channel + i;
    const bool there = o < piece.out_channels;
    bias[i] = there && job.bias ? param_at(job.bias, job.bias_type, o) : 0.0f;
    const float without = piece.act == 0 ? 1.0f : 0.0f;
    slope[i] = there && job.slope ? param_at(job.slope, job.slope_type, o * job.slope_step) : without;
  }
  // 4. Weights [pair][ky][tile][lane][tap of the pair]: what a lane holds as the second factor of a product
  constexpr int kWordElements = 4 / (int)sizeof(T);
  Pack<T, 2 * kWordElements>* weights = reinterpret_cast<Pack<T, 2 * kWordElements>*>(data + weights_at(piece));
  for (int i = threadIdx.x; i < num_weight_pairs(piece); i += blockDim.x) {
    const int lane = i % 32, n = i / 32 % piece.tiles, ky = i / 32 / piece.tiles % piece.kernel;
    const int pair = i / 32 / piece.tiles / piece.kernel;
    const int o = piece.first_channel + n * kTileChannels + lane / 4;
    Pack<T, 2 * kWordElements> made;
#pragma unroll
    for (int e = 0; e < 2 * kWordElements; ++e) {
      const int tap = 2 * pair + e / kWordElements, kx = tap / planes;
      const int in = tap % planes * kUnit<T> + lane % 4 * kWordElements + e % kWordElements;
      const bool there = tap < piece.num_taps && o < piece.out_channels && in < job.in_channels;
      const int64_t at = ((int64_t{o} * job.in_channels + in) * piece.kernel + ky) * piece.kernel + kx;
      made.v[e] = from_float<T>(there ? param_at(job.weight, job.weight_type, at) : 0.0f);
    }
    weights[i] = made;
  }
}

}  // namespace
}  // namespace brt
