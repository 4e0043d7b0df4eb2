// grouped_conv2d: a convolution for each path, one launch for all paths of a kind. The paths are described in the
// kernel's argument, so nothing is copied to the device and a graph can hold the call.
//
// R rows of a path, C O channels in and out (of a group), K = C k k what is summed over, pixels: places of the results
// of all rows of a path.
//
// Three kernels: products of weights [O, K] with pixels [K, pixels] that are read where they lie (implicit im2col), on
// tensor cores for halves and by multiply-adds for float32; and one result a thread where a group has few channels.
#include "../grouped_conv2d.h"
#include "common.cuh"

#include <algorithm>

namespace brt {
namespace {

struct Conv {
  const void *x, *weight, *bias, *residual, *slope;
  void* out;
  int num_rows, channels, height, width, out_channels, out_height, out_width, kernel, stride, padding, groups;
  int slope_step;       // 0: one slope for all channels
  unsigned first_tile;  // of this path, among the blocks of the launch
  unsigned tiles_out;   // tiles along the output channels of a group
  int tile_out;         // of so many channels: 16, 32 or 64
};

constexpr int kMostConvs = 35;  // of a launch

struct Table {
  Conv convs[kMostConvs];
  int num_convs;
  ConvAct act;
};
static_assert(sizeof(Table) <= 4096, "a kernel's arguments have 4 KiB on every toolkit");

__device__ __forceinline__ const Conv& find_conv(const Table& table, unsigned block) {
  int p = 0;
  while (p + 1 < table.num_convs && block >= table.convs[p + 1].first_tile) ++p;
  return table.convs[p];
}

__device__ inline float activate(float y, ConvAct act, float slope) {
  switch (act) {
    case ConvAct::kRelu: return y > 0.0f || y != y ? y : 0.0f;
    case ConvAct::kPrelu: return y > 0.0f ? y : y * slope;
    case ConvAct::kSigmoid: return 1.0f / (1.0f + __expf(-y));
    case ConvAct::kSilu: return y / (1.0f + __expf(-y));
    default: return y;
  }
}

// Adds bias and residual, activates, writes. `at` is the place of the result in out and residual.
template <class T>
__device__ __forceinline__ void finish(const Conv& c, ConvAct act, int o, int64_t at, float y) {
  if (c.bias) y += to_float(static_cast<const T*>(c.bias)[o]);
  if (c.residual) y += to_float(static_cast<const T*>(c.residual)[at]);
  const float slope = act == ConvAct::kPrelu ? to_float(static_cast<const T*>(c.slope)[o * c.slope_step]) : 0.0f;
  static_cast<T*>(c.out)[at] = from_float<T>(activate(y, act, slope));
}

// What a block of the two products makes: some output channels of one group at some pixels.
struct Tile {
  int group, first_out, num_out, num_in;  // first_out: of all channels
  unsigned first_pixel, num_pixels, plane;  // num_pixels: of the path; plane: of a result
  unsigned taps, num_sums;                  // k k and K
};

__device__ inline Tile tile_of(const Conv& c, unsigned block, int tile_out, int tile_pixels) {
  const unsigned tile = block - c.first_tile, column = tile / c.tiles_out;
  const int group_out = c.out_channels / c.groups, first = (tile % c.tiles_out) * tile_out;
  Tile t;
  t.group = column % c.groups;
  t.first_out = t.group * group_out + first;
  t.num_out = min(tile_out, group_out - first);
  t.num_in = c.channels / c.groups;
  t.first_pixel = column / c.groups * tile_pixels;
  t.plane = c.out_height * c.out_width;
  t.num_pixels = c.num_rows * t.plane;
  t.taps = c.kernel * c.kernel;
  t.num_sums = t.num_in * t.taps;
  return t;
}

// Where the taps of one pixel lie: x[c, y + ky, x + kx] of its row, if that is in the image.
template <class T>
struct Pixel {
  const T* image;  // of the first channel of the group, or null: no such pixel
  int y, x;

  __device__ Pixel(const Conv& c, const Tile& t, unsigned pixel) {
    const unsigned row = pixel / t.plane, place = pixel - row * t.plane, out_y = place / c.out_width;
    y = static_cast<int>(out_y) * c.stride - c.padding;
    x = static_cast<int>(place - out_y * c.out_width) * c.stride - c.padding;
    const int64_t size = int64_t{c.height} * c.width;
    image = pixel < t.num_pixels
        ? static_cast<const T*>(c.x) + (int64_t{row} * c.channels + int64_t{t.group} * t.num_in) * size
        : nullptr;
  }
};

// The values that the pixel multiplies with sums k0 to k0 + kCount - 1.
template <int kCount, class T, class Raw>
__device__ __forceinline__ void read_pixel(const Conv& c, const Tile& t, const Pixel<T>& at, unsigned k0, Raw (&values)[kCount]) {
  static_assert(sizeof(T) == sizeof(Raw), "bits of T");
  unsigned channel = k0 / t.taps;
  const unsigned tap = k0 - channel * t.taps;
  int ky = tap / c.kernel, kx = tap - ky * c.kernel;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int y = at.y + ky, x = at.x + kx;
    const bool there = at.image != nullptr && channel < static_cast<unsigned>(t.num_in) &&
        static_cast<unsigned>(y) < static_cast<unsigned>(c.height) &&
        static_cast<unsigned>(x) < static_cast<unsigned>(c.width);
    const unsigned place = (channel * c.height + y) * c.width + x;
    values[i] = there ? reinterpret_cast<const Raw*>(at.image)[place] : Raw{};
    if (++kx == c.kernel) {
      kx = 0;
      if (++ky == c.kernel) {
        ky = 0;
        ++channel;
      }
    }
  }
}

// ---- Tensor cores ----

__device__ inline void load_matrices(unsigned (&r)[4], const void* shared) {
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}

__device__ inline void load_transposed(unsigned (&r)[4], const void* shared) {
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

constexpr int kThreads = 128, kPixels = 128, kStep = 32;
constexpr int kWeightRow = kStep + 8, kPixelRow = kPixels + 8;  // eight rows of 16 bytes are in different banks
constexpr int kOut = 16;  // output channels of a tile: more would read pixels less often, and make fewer blocks

// Eight weights of one output channel from k on; zeros past the last.
__device__ inline uint4 read_weights(const uint16_t* row, unsigned k, unsigned num_sums, bool vectors) {
  uint4 made = make_uint4(0, 0, 0, 0);
  if (vectors) return k < num_sums ? *reinterpret_cast<const uint4*>(row + k) : made;
  unsigned words[4] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const unsigned value = k + i < num_sums ? row[k + i] : 0;
    words[i / 2] |= value << (i % 2 * 16);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

template <class T>
__device__ __forceinline__ void tensor_tile(const Conv& c, ConvAct act, unsigned block, uint16_t* weights, uint16_t* pixels) {
  constexpr int kTileM = kOut / 16, kTileN = kPixels / 4 / 8;        // of a warp, which takes all channels
  constexpr int kPieces = (kOut * kStep / 8 + kThreads - 1) / kThreads;  // of 16 bytes of weights, a thread
  const Tile t = tile_of(c, block, kOut, kPixels);
  const Pixel<T> mine(c, t, t.first_pixel + threadIdx.x);
  const uint16_t* weight = static_cast<const uint16_t*>(c.weight) + int64_t{t.first_out} * t.num_sums;
  const bool vectors = t.num_sums % 8 == 0 && reinterpret_cast<uintptr_t>(c.weight) % 16 == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // 1. What the next step needs, in registers
  uint16_t next_pixels[kStep];
  uint4 next_weights[kPieces];
  const auto bring = [&](unsigned k0) {
    read_pixel<kStep>(c, t, mine, k0, next_pixels);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * kThreads, row = piece / 4;
      next_weights[i] = make_uint4(0, 0, 0, 0);
      if (row < t.num_out) {
        next_weights[i] = read_weights(weight + int64_t{row} * t.num_sums, k0 + piece % 4 * 8, t.num_sums, vectors);
      }
    }
  };

  // 2. Multiply one step while the next arrives
  float sums[kTileM][kTileN][4] = {};
  bring(0);
  for (unsigned k0 = 0; k0 < t.num_sums; k0 += kStep) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kStep; ++i) pixels[i * kPixelRow + threadIdx.x] = next_pixels[i];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int piece = threadIdx.x + i * kThreads;
      if (piece < kOut * kStep / 8) {
        *reinterpret_cast<uint4*>(weights + piece / 4 * kWeightRow + piece % 4 * 8) = next_weights[i];
      }
    }
    __syncthreads();
    if (k0 + kStep < t.num_sums) bring(k0 + kStep);
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      unsigned a[kTileM][4];
#pragma unroll
      for (int m = 0; m < kTileM; ++m) {
        load_matrices(a[m], weights + (m * 16 + lane % 16) * kWeightRow + k + lane / 16 * 8);
      }
#pragma unroll
      for (int n = 0; n < kTileN; n += 2) {
        unsigned b[4];
        load_transposed(b, pixels + (k + lane % 16) * kPixelRow + warp * 32 + n * 8 + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < kTileM; ++m) {
          multiply_add<T>(sums[m][n], a[m], b[0], b[1]);
          multiply_add<T>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // 3. Results
#pragma unroll
  for (int n = 0; n < kTileN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned pixel = t.first_pixel + warp * 32 + n * 8 + lane % 4 * 2 + j;
      if (pixel >= t.num_pixels) continue;
      const unsigned row = pixel / t.plane;
      const int64_t base = int64_t{row} * c.out_channels * t.plane + (pixel - row * t.plane);
#pragma unroll
      for (int m = 0; m < kTileM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int o = m * 16 + half * 8 + lane / 4;
          if (o >= t.num_out) continue;
          const int channel = t.first_out + o;
          finish<T>(c, act, channel, base + int64_t{channel} * t.plane, sums[m][n][half * 2 + j]);
        }
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) tensor_conv(const __grid_constant__ Table table) {
  __shared__ __align__(16) uint16_t weights[kOut * kWeightRow];
  __shared__ __align__(16) uint16_t pixels[kStep * kPixelRow];
  const Conv& c = find_conv(table, blockIdx.x);
  tensor_tile<T>(c, table.act, blockIdx.x, weights, pixels);
}

// ---- Multiply-adds ----

constexpr int kPlainThreads = 256, kDepth = 16, kPlainNumel = 4096;  // results of a tile, 16 a thread

template <int kTileOut>
__device__ __forceinline__ void plain_tile(const Conv& c, ConvAct act, unsigned block, float* shared) {
  constexpr int kTilePixels = kPlainNumel / kTileOut, kSpread = kPlainThreads / kTilePixels, kReads = kDepth / kSpread;
  static_assert(kTilePixels <= kPlainThreads && kDepth % kSpread == 0, "a thread reads one pixel");
  float* weights = shared;                 // [kDepth][kTileOut]
  float* pixels = shared + kDepth * kTileOut;  // [kDepth][kTilePixels]
  const Tile t = tile_of(c, block, kTileOut, kTilePixels);
  const int column = threadIdx.x % kTilePixels, part = threadIdx.x / kTilePixels * kReads;
  const Pixel<float> mine(c, t, t.first_pixel + column);
  const float* weight = static_cast<const float*>(c.weight) + int64_t{t.first_out} * t.num_sums;
  const int tx = threadIdx.x % (kTilePixels / 4), ty = threadIdx.x / (kTilePixels / 4);
  float sums[4][4] = {};
  for (unsigned k0 = 0; k0 < t.num_sums; k0 += kDepth) {
    float values[kReads];
    read_pixel<kReads>(c, t, mine, k0 + part, values);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kReads; ++i) pixels[(part + i) * kTilePixels + column] = values[i];
    for (int i = threadIdx.x; i < kDepth * kTileOut; i += kPlainThreads) {
      const int o = i / kDepth;
      const unsigned k = k0 + i % kDepth;
      weights[i % kDepth * kTileOut + o] = o < t.num_out && k < t.num_sums ? weight[int64_t{o} * t.num_sums + k] : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = weights[k * kTileOut + ty * 4 + i];
#pragma unroll
      for (int j = 0; j < 4; ++j) b[j] = pixels[k * kTilePixels + tx + j * (kTilePixels / 4)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned pixel = t.first_pixel + tx + j * (kTilePixels / 4);
    if (pixel >= t.num_pixels) continue;
    const unsigned row = pixel / t.plane;
    const int64_t base = int64_t{row} * c.out_channels * t.plane + (pixel - row * t.plane);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (ty * 4 + i >= t.num_out) continue;
      const int channel = t.first_out + ty * 4 + i;
      finish<float>(c, act, channel, base + int64_t{channel} * t.plane, sums[i][j]);
    }
  }
}

__global__ void __launch_bounds__(kPlainThreads) plain_conv(const __grid_constant__ Table table) {
  __shared__ float shared[kDepth * (kPlainThreads + 16)];  // the widest: 16 channels at 256 pixels
  const Conv& c = find_conv(table, blockIdx.x);
  switch (c.tile_out) {
    case 16: return plain_tile<16>(c, table.act, blockIdx.x, shared);
    case 32: return plain_tile<32>(c, table.act, blockIdx.x, shared);
    default: return plain_tile<64>(c, table.act, blockIdx.x, shared);
  }
}

// ---- Groups of few channels ----

constexpr int kDown = 4;  // results of a thread, one below the other: a weight is read once for them

inline int64_t down_tiles(const PathConv& c) {
  const int64_t columns = (c.out_height + kDown - 1) / kDown * c.out_width;
  return (c.num_rows * c.out_channels * columns + kPlainThreads - 1) / kPlainThreads;
}

template <class T>
__global__ void __launch_bounds__(kPlainThreads) direct_conv(const __grid_constant__ Table table) {
  const Conv& c = find_conv(table, blockIdx.x);
  // 1. Which results
  const unsigned in_plane = (c.out_height + kDown - 1) / kDown * c.out_width;
  const int64_t i = int64_t{blockIdx.x - c.first_tile} * kPlainThreads + threadIdx.x;
  const int64_t plane = i / in_plane;  // row * O + o
  if (plane >= int64_t{c.num_rows} * c.out_channels) return;
  const unsigned place = static_cast<unsigned>(i - plane * in_plane), down = place / c.out_width;
  const int out_y = down * kDown, out_x = place - down * c.out_width;
  const int64_t row = plane / c.out_channels;
  const int o = static_cast<int>(plane - row * c.out_channels), num_in = c.channels / c.groups;
  const int group = o / (c.out_channels / c.groups);
  // 2. Sums
  const int size = c.height * c.width;
  const T* image = static_cast<const T*>(c.x) + (row * c.channels + int64_t{group} * num_in) * size;
  const T* weight = static_cast<const T*>(c.weight) + int64_t{o} * num_in * c.kernel * c.kernel;
  const int first_y = out_y * c.stride - c.padding, first_x = out_x * c.stride - c.padding;
  float sums[kDown] = {};
  for (int in = 0; in < num_in; ++in, image += size) {
    for (int ky = 0; ky < c.kernel; ++ky) {
      for (int kx = 0; kx < c.kernel; ++kx, ++weight) {
        const int x = first_x + kx;
        if (static_cast<unsigned>(x) >= static_cast<unsigned>(c.width)) continue;
        const float w = to_float(*weight);
#pragma unroll
        for (int j = 0; j < kDown; ++j) {
          const int y = first_y + ky + j * c.stride;
          if (static_cast<unsigned>(y) < static_cast<unsigned>(c.height)) sums[j] += w * to_float(image[y * c.width + x]);
        }
      }
    }
  }
  // 3. Results
  for (int j = 0; j < kDown && out_y + j < c.out_height; ++j) {
    finish<T>(c, table.act, o, (plane * c.out_height + out_y + j) * c.out_width + out_x, sums[j]);
  }
}

// ---- Choice ----

enum class Kind { kProduct, kDirect };

// A product wastes what a group has less than 16 output channels.
Kind kind_of(const PathConv& c) {
  return c.groups > 1 && c.out_channels / c.groups < 8 ? Kind::kDirect : Kind::kProduct;
}

Conv conv_of(const PathConv& c, const Tensor& out) {
  const auto data = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; };
  Conv made{};
  made.x = c.x.const_data_ptr();
  made.weight = c.weight.const_data_ptr();
  made.bias = data(c.bias);
  made.residual = data(c.residual);
  made.slope = data(c.slope);
  made.out = out.mutable_data_ptr();
  made.num_rows = (int)c.num_rows;
  made.channels = (int)c.channels;
  made.height = (int)c.height;
  made.width = (int)c.width;
  made.out_channels = (int)c.out_channels;
  made.out_height = (int)c.out_height;
  made.out_width = (int)c.out_width;
  made.kernel = (int)c.kernel;
  made.stride = (int)c.stride;
  made.padding = (int)c.padding;
  made.groups = (int)c.groups;
  made.slope_step = c.slope && c.slope->numel() > 1;
  return made;
}

// The tiles of a path, each of as many channels as a group has, rounded up; of halves always of kOut.
int64_t tiles_of(const PathConv& c, Kind kind, bool halves, Conv* conv) {
  if (kind == Kind::kDirect) return down_tiles(c);
  const int64_t group_out = c.out_channels / c.groups;
  const int64_t tile_out = halves ? kOut : group_out <= 16 ? 16 : group_out <= 32 ? 32 : 64;
  const int64_t tile_pixels = halves ? kPixels : kPlainNumel / tile_out;
  const int64_t along_out = (group_out + tile_out - 1) / tile_out;
  conv->tile_out = (int)tile_out;
  conv->tiles_out = (unsigned)along_out;
  return along_out * c.groups * ((c.num_rows * c.out_height * c.out_width + tile_pixels - 1) / tile_pixels);
}

template <class T>
void launch(Kind kind, const Table& table, int64_t num_tiles, cudaStream_t stream) {
  const unsigned blocks = blocks_for(num_tiles, 1);
  if (kind == Kind::kDirect) {
    direct_conv<T><<<blocks, kPlainThreads, 0, stream>>>(table);
  } else if constexpr (sizeof(T) == 2) {
    tensor_conv<T><<<blocks, kThreads, 0, stream>>>(table);
  } else {
    plain_conv<<<blocks, kPlainThreads, 0, stream>>>(table);
  }
  BRT_LAUNCHED();
}

// Positions in images, weights and results of a path are ints.
void check_sizes(const PathConv& c, int64_t p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  BRT_CHECK(c.num_rows * c.out_height * c.out_width < kMost - 256 && c.channels * c.height * c.width < kMost &&
                c.out_channels * c.out_height * c.out_width < kMost && c.weight.numel() < kMost && c.stride < kMost,
            "path ", p, " is too large for the CUDA kernel: images, results and weights of up to 2^31 values");
}

}  // namespace

std::vector<Tensor> grouped_conv2d_cuda(std::vector<Tensor> x, std::vector<Tensor> weight, std::vector<Tensor> extras,
                                        std::vector<int64_t> convs, std::string activation) {
  // 1. Shapes
  const ConvAct act = conv_act_of(activation);
  BRT_CHECK(!x.empty(), "grouped_conv2d needs at least one path");
  const OnDevice device(x[0]);
  const std::vector<PathConv> paths = checked_convs(x, weight, extras, convs, act);
  std::vector<Tensor> made;
  for (size_t p = 0; p < paths.size(); ++p) {
    check_sizes(paths[p], (int64_t)p);
    made.push_back(new_empty(x[0], paths[p].out_shape(), x[0].scalar_type()));
  }

  // 2. One launch for the paths of each kind, or for as many of them as a kernel's argument describes
  with_real(x[0], [&](auto zero) {
    using T = decltype(zero);
    for (const Kind kind : {Kind::kProduct, Kind::kDirect}) {
      Table table{};
      table.act = act;
      int64_t num_tiles = 0;
      const auto flush = [&] {
        if (table.num_convs > 0) launch<T>(kind, table, num_tiles, device.stream());
        table.num_convs = 0;
        num_tiles = 0;
      };
      for (size_t p = 0; p < paths.size(); ++p) {
        if (kind_of(paths[p]) != kind || paths[p].num_rows == 0) continue;
        Conv& conv = table.convs[table.num_convs++];
        conv = conv_of(paths[p], made[p]);
        conv.first_tile = (unsigned)num_tiles;
        num_tiles += tiles_of(paths[p], kind, sizeof(T) == 2, &conv);
        BRT_CHECK(num_tiles < (int64_t{1} << 31), num_tiles, " tiles are too many for one launch");
        if (table.num_convs == kMostConvs) flush();
      }
      flush();
    }
  });
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d_cuda)); }

}  // namespace brt
