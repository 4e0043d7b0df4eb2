// Convolutions 3x3 and 1x1, stride 1, on one cell at a time, by nested Winograd: F(4, 3) down the rows and
// F(2, 3) along them, 3 multiplications for each output and input channel instead of 9.
//
// A *plane* is an image [C, H, W] as these steps keep it. Each row holds its even pixels, then its odd ones, each
// in whole vectors with zeros at the end: lane j of the two vectors is the tile of pixels 2j and 2j + 1, so F(2, 3)
// along the row needs no shuffle but a shift by one lane. Above each channel is one row of zeros, below it as many
// as make the rows a multiple of four, and one: steps never write there, so they are cleared once.
//
// Letters: C channels, I O channels in and out, H height, W width, V vectors of a row's even (or odd) pixels,
// fy fx the 6 and 4 frequencies of a tile of 4 x 2 outputs.
//
// NOTES: The residual is added at the end. Starting the sums from it would cost ten times the rounding error.
#include "conv_chain.h"

#include "vec.h"

namespace brt::BRT_ISA {
namespace {

constexpr int kFy = 6, kFx = 4, kTileRows = 4;
#ifdef __AVX512F__
constexpr int kMaxBlock = 6;  // output channels at a time: 6 * 4 sums, 4 inputs, of 32 registers
#else
constexpr int kMaxBlock = 2;
#endif

struct Plane {
  int64_t num_vectors, row, channel;  // V; floats of a row and of a channel
  Plane(int64_t height, int64_t width) {
    num_vectors = ((width + 1) / 2 + kLanes - 1) / kLanes;
    row = 2 * num_vectors * kLanes;
    channel = ((height + kTileRows - 1) / kTileRows * kTileRows + 2) * row;
  }
};

struct Blocks {
  int64_t count, base, extra;  // `extra` blocks of base + 1 output channels, then blocks of base
  explicit Blocks(int64_t channels) {
    count = (channels + kMaxBlock - 1) / kMaxBlock;
    base = count ? channels / count : 0;
    extra = count ? channels % count : 0;
  }
  int64_t size(int64_t i) const { return base + (i < extra); }
};

// v moved up by one lane, zero entering below; and down.
BRT_INLINE Vec shift_up(Vec v) {
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_alignr_epi32((__mmask16)0xfffe, (__m512i)v, (__m512i)v, 15);
#else
  const __m256i zero_low = _mm256_permute2x128_si256((__m256i)v, (__m256i)v, 0x08);
  return (Vec)_mm256_alignr_epi8((__m256i)v, zero_low, 12);
#endif
}
BRT_INLINE Vec shift_down(Vec v) {
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_alignr_epi32((__mmask16)0x7fff, (__m512i)v, (__m512i)v, 1);
#else
  const __m256i high_zero = _mm256_permute2x128_si256((__m256i)v, (__m256i)v, 0x81);
  return (Vec)_mm256_alignr_epi8(high_zero, (__m256i)v, 4);
#endif
}

// All ones in the lanes of vector `v` that hold pixels, where `count` pixels have this parity.
BRT_INLINE VecI lane_mask(int64_t count, int64_t v) {
  VecI mask;
  for (int i = 0; i < kLanes; ++i) mask[i] = v * kLanes + i < count ? -1 : 0;
  return mask;
}

// B^T of F(4, 3) with the points 0, 1, -1, 2, -2
BRT_INLINE void input_rows(const Vec d[kFy], Vec f[kFy]) {
  const Vec a = d[4] - 4.0f * d[2], b = d[3] - 4.0f * d[1];
  const Vec c = d[4] - d[2], e = 2.0f * (d[3] - d[1]);
  f[0] = 4.0f * (d[0] - d[2]) + c;
  f[1] = a + b;
  f[2] = a - b;
  f[3] = c + e;
  f[4] = c - e;
  f[5] = 4.0f * (d[1] - d[3]) + (d[5] - d[3]);
}

// A^T of F(4, 3)
BRT_INLINE void output_rows(const Vec m[kFy], Vec y[kTileRows]) {
  const Vec s1 = m[1] + m[2], d1 = m[1] - m[2], s2 = m[3] + m[4], d2 = m[3] - m[4];
  y[0] = m[0] + s1 + s2;
  y[1] = d1 + 2.0f * d2;
  y[2] = s1 + 4.0f * s2;
  y[3] = d1 + 8.0f * d2 + m[5];
}

// One channel of one row of tiles: from 6 rows of the plane to frequencies [V][fy][I][fx].
void transform_input(const float* rows, const Plane& plane, int64_t in_channels, int64_t ci, float* freq) {
  const int64_t num_vectors = plane.num_vectors, half = num_vectors * kLanes;
  for (int64_t v = 0; v < num_vectors; ++v) {
    Vec even[kFy], odd[kFy], left[kFy], right[kFy], d[kFy];
#pragma GCC unroll 6
    for (int r = 0; r < kFy; ++r) d[r] = load(rows + r * plane.row + v * kLanes);
    input_rows(d, even);
#pragma GCC unroll 6
    for (int r = 0; r < kFy; ++r) d[r] = load(rows + r * plane.row + half + v * kLanes);
    input_rows(d, odd);
    if (v > 0) {
#pragma GCC unroll 6
    for (int r = 0; r < kFy; ++r) d[r] = load(rows + r * plane.row + half + v * kLanes - 1);
      input_rows(d, left);
    } else {
#pragma GCC unroll 6
      for (int f = 0; f < kFy; ++f) left[f] = shift_up(odd[f]);
    }
    if (v + 1 < num_vectors) {
#pragma GCC unroll 6
    for (int r = 0; r < kFy; ++r) d[r] = load(rows + r * plane.row + v * kLanes + 1);
      input_rows(d, right);
    } else {
#pragma GCC unroll 6
      for (int f = 0; f < kFy; ++f) right[f] = shift_down(even[f]);
    }
#pragma GCC unroll 6
    for (int f = 0; f < kFy; ++f) {
      float* to = freq + (((v * kFy + f) * in_channels + ci) * kFx) * kLanes;
      store(to, left[f] - odd[f]);
      store(to + kLanes, even[f] + odd[f]);
      store(to + 2 * kLanes, odd[f] - even[f]);
      store(to + 3 * kLanes, even[f] - right[f]);
    }
  }
}

// kBlock output channels at one fy: sum over input channels, then A^T of F(2, 3) along the row.
template <int kBlock>
void multiply(const float* freq, const float* packed, int64_t in_channels, float* out, int64_t out_stride) {
  Vec sums[kBlock][kFx];
#pragma GCC unroll 6
  for (int o = 0; o < kBlock; ++o) {
#pragma GCC unroll 4
    for (int fx = 0; fx < kFx; ++fx) sums[o][fx] = Vec{};
  }
  for (int64_t ci = 0; ci < in_channels; ++ci, freq += kFx * kLanes, packed += kFx * kBlock) {
#pragma GCC unroll 4
    for (int fx = 0; fx < kFx; ++fx) {
      const Vec in = load(freq + fx * kLanes);
#pragma GCC unroll 6
      for (int o = 0; o < kBlock; ++o) sums[o][fx] += packed[fx * kBlock + o] * in;
    }
  }
#pragma GCC unroll 6
  for (int o = 0; o < kBlock; ++o) {
    store(out + o * out_stride, sums[o][0] + (sums[o][1] + sums[o][2]));
    store(out + o * out_stride + kLanes, (sums[o][1] - sums[o][2]) - sums[o][3]);
  }
}

void multiply_block(int64_t block, const float* freq, const float* packed, int64_t in_channels, float* out,
                    int64_t out_stride) {
  switch (block) {
    case 1: return multiply<1>(freq, packed, in_channels, out, out_stride);
    case 2: return multiply<2>(freq, packed, in_channels, out, out_stride);
#ifdef __AVX512F__
    case 3: return multiply<3>(freq, packed, in_channels, out, out_stride);
    case 4: return multiply<4>(freq, packed, in_channels, out, out_stride);
    case 5: return multiply<5>(freq, packed, in_channels, out, out_stride);
    case 6: return multiply<6>(freq, packed, in_channels, out, out_stride);
#endif
  }
}

struct Finish {
  Vec bias, slope;
  float scale;
  bool act, post_relu, scaled;
};

BRT_INLINE Finish finish_of(const ConvStep& step, int64_t o) {
  return {splat(step.bias ? step.bias[o] : 0.0f), splat(step.slope ? step.slope[o] : 0.0f), step.scale,
          step.relu || step.slope, step.post_relu, step.scale != 1.0f};
}

BRT_INLINE Vec finish(Vec y, const Finish& f, const float* add) {
  y += f.bias;
  if (f.act) y = y > 0.0f ? y : y * f.slope;
  if (f.scaled) y *= f.scale;
  if (add) y += load(add);
  if (f.post_relu) y = y > 0.0f ? y : (y != y ? y : Vec{});
  return y;
}

// dst at one row of tiles and one vector, all output channels, from sums [O][fy][2].
void transform_output(const ConvStep& step, float* dst, const Plane& plane, int64_t tile, int64_t v, const float* sums) {
  const VecI masks[2] = {lane_mask((step.width + 1) / 2, v), lane_mask(step.width / 2, v)};
  const int64_t first = tile * kTileRows, left = step.height - first, half = plane.num_vectors * kLanes;
  const int64_t num_rows = left < kTileRows ? left : kTileRows;
  for (int64_t o = 0; o < step.out_channels; ++o, sums += kFy * 2 * kLanes) {
    const Finish how = finish_of(step, o);
    for (int phase = 0; phase < 2; ++phase) {
      Vec m[kFy], y[kTileRows];
#pragma GCC unroll 6
      for (int f = 0; f < kFy; ++f) m[f] = load(sums + (f * 2 + phase) * kLanes);
      output_rows(m, y);
      const int64_t at = o * plane.channel + (first + 1) * plane.row + phase * half + v * kLanes;
#pragma GCC unroll 4
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= num_rows) break;
        const Vec done = finish(y[r], how, step.add ? step.add + at + r * plane.row : nullptr);
        store(dst + at + r * plane.row, (Vec)((VecI)done & masks[phase]));
      }
    }
  }
}

void conv3x3(const ConvStep& step, float* dst, float* scratch) {
  const Plane plane(step.height, step.width);
  const Blocks blocks(step.out_channels);
  const int64_t num_tiles = (step.height + kTileRows - 1) / kTileRows, num_in = step.in_channels;
  float* freq = scratch;
  float* sums = scratch + plane.num_vectors * kFy * num_in * kFx * kLanes;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    for (int64_t ci = 0; ci < num_in; ++ci) {
      transform_input(step.src + ci * plane.channel + tile * kTileRows * plane.row, plane, num_in, ci, freq);
    }
    for (int64_t v = 0; v < plane.num_vectors; ++v) {
      const float* packed = step.packed;
      for (int fy = 0; fy < kFy; ++fy) {
        const float* in = freq + ((v * kFy + fy) * num_in * kFx) * kLanes;
        float* out = sums + fy * 2 * kLanes;
        for (int64_t b = 0; b < blocks.count; ++b) {
          const int64_t size = blocks.size(b);
          multiply_block(size, in, packed, num_in, out, kFy * 2 * kLanes);
          packed += num_in * kFx * size;
          out += size * kFy * 2 * kLanes;
        }
      }
      transform_output(step, dst, plane, tile, v, sums);
    }
  }
}

void conv1x1(const ConvStep& step, float* dst) {
  const Plane plane(step.height, step.width);
  const int64_t half = plane.num_vectors * kLanes;
  for (int64_t o = 0; o < step.out_channels; ++o) {
    const Finish how = finish_of(step, o);
    const float* weight = step.packed + o * step.in_channels;
    for (int64_t y = 1; y <= step.height; ++y) {
      for (int64_t i = 0; i < 2 * half; i += kLanes) {
        const int64_t phase = i >= half, at = y * plane.row + i;
        Vec total = {};
        for (int64_t ci = 0; ci < step.in_channels; ++ci) total += weight[ci] * load(step.src + ci * plane.channel + at);
        const VecI mask = lane_mask((step.width + 1 - phase) / 2, (i - phase * half) / kLanes);
        const Vec done = finish(total, how, step.add ? step.add + o * plane.channel + at : nullptr);
        store(dst + o * plane.channel + at, (Vec)((VecI)done & mask));
      }
    }
  }
}

// a0 b0 a1 b1 ...: the lower half of the lanes, and the upper.
BRT_INLINE void interleave(Vec a, Vec b, Vec& low, Vec& high) {
#ifdef __AVX512F__
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  low = (Vec)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
#else
  const __m256 x = _mm256_unpacklo_ps((__m256)a, (__m256)b), y = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Vec)_mm256_permute2f128_ps(x, y, 0x20);
  high = (Vec)_mm256_permute2f128_ps(x, y, 0x31);
#endif
}

// The even lanes of (a, b), and the odd ones.
BRT_INLINE void split(Vec a, Vec b, Vec& even, Vec& odd) {
#ifdef __AVX512F__
  const __m512i evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  even = (Vec)_mm512_permutex2var_ps((__m512)a, evens, (__m512)b);
  odd = (Vec)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(evens, _mm512_set1_epi32(1)), (__m512)b);
#else
  const __m256i x = (__m256i)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  const __m256i y = (__m256i)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd);
  even = (Vec)_mm256_permute4x64_epi64(x, 0xd8);
  odd = (Vec)_mm256_permute4x64_epi64(y, 0xd8);
#endif
}

// One row of a plane, pixels in order; `out` has room for whole vectors.
void merge_row(float* out, const float* row, int64_t num_vectors) {
  for (int64_t v = 0; v < num_vectors; ++v) {
    Vec low, high;
    interleave(load(row + v * kLanes), load(row + (num_vectors + v) * kLanes), low, high);
    store(out + 2 * v * kLanes, low);
    store(out + (2 * v + 1) * kLanes, high);
  }
}

// The reverse; `in` has zeros after its pixels up to whole vectors.
void split_row(float* row, const float* in, int64_t num_vectors) {
  for (int64_t v = 0; v < num_vectors; ++v) {
    Vec even, odd;
    split(load(in + 2 * v * kLanes), load(in + (2 * v + 1) * kLanes), even, odd);
    store(row + v * kLanes, even);
    store(row + (num_vectors + v) * kLanes, odd);
  }
}

// PixelShuffle from a plane of C * r * r channels to one of C: row y * r + dy of channel c is made of the rows y of
// channels (c * r + dy) * r + dx, pixel by pixel.
void pixel_shuffle(float* dst, const float* src, const ConvStep& step, float* lines) {
  const int64_t r = step.shuffle, num_channels = step.out_channels / (r * r);
  const Plane from(step.height, step.width), to(step.height * r, step.width * r);
  const int64_t line = from.row;
  float* whole = lines + r * line;  // the row in order
  for (int64_t i = step.width * r; i < to.row; ++i) whole[i] = 0;
  for (int64_t c = 0; c < num_channels; ++c) {
    for (int64_t y = 0; y < step.height * r; ++y) {
      for (int64_t dx = 0; dx < r; ++dx) {
        const float* row = src + ((c * r + y % r) * r + dx) * from.channel + (y / r + 1) * from.row;
        merge_row(lines + dx * line, row, from.num_vectors);
      }
      float* out = dst + c * to.channel + (y + 1) * to.row;
      if (r == 2 && to.num_vectors == 2 * from.num_vectors) {
        // the even pixels of the result are the row of dx = 0, the odd ones that of dx = 1
        memcpy(out, lines, line * sizeof(float));
        memcpy(out + to.num_vectors * kLanes, lines + line, line * sizeof(float));
        continue;
      }
      for (int64_t dx = 0; dx < r; ++dx) {
        for (int64_t x = 0; x < step.width; ++x) whole[x * r + dx] = lines[dx * line + x];
      }
      split_row(out, whole, to.num_vectors);
    }
  }
}

}  // namespace

int64_t plane_numel(int64_t channels, int64_t height, int64_t width) { return channels * Plane(height, width).channel; }

int64_t conv_packed_numel(int64_t out_channels, int64_t in_channels, int64_t kernel) {
  return out_channels * in_channels * (kernel == 3 ? kFy * kFx : 1);
}

int64_t conv_scratch_numel(const ConvStep& step) {
  const Plane plane(step.height, step.width);
  int64_t numel = plane.num_vectors * kFy * step.in_channels * kFx * kLanes + step.out_channels * kFy * 2 * kLanes;
  if (step.shuffle > 1) {
    const Plane to(step.height * step.shuffle, step.width * step.shuffle);
    numel += step.out_channels * plane.channel + step.shuffle * plane.row + to.row + 2 * kLanes;
  }
  return numel;
}

// From [O, I, 3, 3] to [fy][block][I][fx][channel of the block]; [O, I, 1, 1] stays.
void conv_pack(float* packed, const float* weight, int64_t out_channels, int64_t in_channels, int64_t kernel) {
  if (kernel == 1) {
    memcpy(packed, weight, out_channels * in_channels * sizeof(float));
    return;
  }
  const Blocks blocks(out_channels);
  const int64_t per_fy = out_channels * in_channels * kFx;
  for (int64_t b = 0, o0 = 0; b < blocks.count; o0 += blocks.size(b++)) {
    const int64_t size = blocks.size(b);
    for (int64_t ci = 0; ci < in_channels; ++ci) {
      // 1. The kernels of one block, lane = channel of the block
      typedef float Lane __attribute__((vector_size(32)));
      Lane g[3][3] = {};
      for (int64_t o = 0; o < size; ++o) {
        const float* from = weight + ((o0 + o) * in_channels + ci) * 9;
        for (int i = 0; i < 9; ++i) g[i / 3][i % 3][o] = from[i];
      }
      // 2. G of F(4, 3) down, then of F(2, 3) along
      for (int fy = 0; fy < kFy; ++fy) {
        Lane t[3];
        for (int x = 0; x < 3; ++x) {
          const Lane a = g[0][x], c = g[1][x], e = g[2][x];
          switch (fy) {
            case 0: t[x] = a * 0.25f; break;
            case 1: t[x] = (a + c + e) * (-1.0f / 6.0f); break;
            case 2: t[x] = (a - c + e) * (-1.0f / 6.0f); break;
            case 3: t[x] = a * (1.0f / 24.0f) + c * (1.0f / 12.0f) + e * (1.0f / 6.0f); break;
            case 4: t[x] = a * (1.0f / 24.0f) - c * (1.0f / 12.0f) + e * (1.0f / 6.0f); break;
            default: t[x] = e;
          }
        }
        const Lane u[kFx] = {t[0], (t[0] + t[1] + t[2]) * 0.5f, (t[0] - t[1] + t[2]) * 0.5f, t[2]};
        float* to = packed + fy * per_fy + o0 * in_channels * kFx + ci * kFx * size;
        for (int fx = 0; fx < kFx; ++fx) {
          for (int64_t o = 0; o < size; ++o) to[fx * size + o] = u[fx][o];
        }
      }
    }
  }
}

void plane_read(float* plane, const float* image, int64_t channels, int64_t height, int64_t width, float* scratch) {
  const Plane p(height, width);
  for (int64_t i = width; i < p.row; ++i) scratch[i] = 0;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t y = 0; y < height; ++y) {
      memcpy(scratch, image + (c * height + y) * width, width * sizeof(float));
      split_row(plane + c * p.channel + (y + 1) * p.row, scratch, p.num_vectors);
    }
  }
}

void plane_write(float* image, const float* plane, int64_t channels, int64_t height, int64_t width, float* scratch) {
  const Plane p(height, width);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t y = 0; y < height; ++y) {
      merge_row(scratch, plane + c * p.channel + (y + 1) * p.row, p.num_vectors);
      memcpy(image + (c * height + y) * width, scratch, width * sizeof(float));
    }
  }
}

void conv_step(const ConvStep& step, float* scratch) {
  float* dst = step.dst;
  float* rest = scratch;
  if (step.shuffle > 1) {
    dst = scratch;
    rest = scratch + plane_numel(step.out_channels, step.height, step.width);
  }
  if (step.kernel == 3) {
    conv3x3(step, dst, rest);
  } else {
    conv1x1(step, dst);
  }
  if (step.shuffle > 1) pixel_shuffle(step.dst, dst, step, rest);
}

}  // namespace brt::BRT_ISA
