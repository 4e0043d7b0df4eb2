// Convolutions of any size, stride and number of groups, directly: image rows as vector lanes.
//
// The rows of a group's channels that a piece reads are first copied to *planes* in float32: one plane for each phase
// (row and column modulo the stride) that the kernel touches, with the zeros of the padding. All planes have rows of
// one length W', and so has the result: output (y, x) of cell n is place f = (n * H' + y) * W' + x, and what tap
// (ky, kx) multiplies for it lies at f plus an offset that depends on the tap only. So a piece is one long row, whole
// vectors of it are made at once whatever the width of the image is, and the last columns of each row are thrown away.
//
// Letters: C O channels of a group in and out, n cells, y x place in the result, f place in the long row.
#include "grouped_conv2d.h"

#include "vec.h"

namespace brt::BRT_ISA {
namespace {

#ifdef __AVX512F__
constexpr int kMaxOut = 8, kVectors = 3;  // 24 sums and 3 inputs of 32 registers
#else
constexpr int kMaxOut = 4, kVectors = 3;  // 12 and 3 of 16
#endif
constexpr int kAloneVectors = 8;              // of one output channel: as many sums as hide the latency
constexpr int64_t kNearNumel = 8 << 10;       // floats of planes that stay in the nearest cache
constexpr int64_t kMostNumel = 128 << 10;     // and in the next
constexpr int64_t kFewRows = 8;               // fewer repeat the copy of the kernel's border too often

BRT_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
BRT_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
BRT_INLINE int64_t whole(int64_t numel) { return (numel + kLanes - 1) / kLanes * kLanes; }

struct Shape {
  int64_t reach, phases;           // rows past the first that a phase's taps reach; phases along a side
  int64_t row, rows, plane;        // W'; rows of a cell in a plane; floats of a plane, of all its cells
  int64_t channel;                 // floats of all phases of a channel
  int64_t long_row, num_vectors;   // places of the result, and vectors that cover them

  Shape(const ConvTask& t, int64_t num_rows) {
    reach = (t.kernel - 1) / t.stride;
    phases = min_of(t.kernel, t.stride);
    row = t.out_width + reach;
    rows = num_rows + reach;
    plane = t.num_cells * rows * row + (phases > 1 ? kLanes : 0);  // rows of several planes are made side by side
    channel = phases * phases * plane;
    long_row = ((t.num_cells - 1) * rows + num_rows) * row - reach;
    num_vectors = (long_row + kLanes - 1) / kLanes;
  }
};

// ---- Reading ----

// from[first + i] of each lane i where that is in [0, width), else 0.
template <class T>
BRT_INLINE Vec load_window(const T* from, int64_t first, int64_t width) {
  if (first >= 0 && first + kLanes <= width) return load(from + first);
#ifdef __AVX512F__
  const int64_t begin = first < 0 ? min_of(-first, kLanes) : 0, end = max_of(min_of(width - first, kLanes), begin);
  const __mmask16 mask = (__mmask16)((1u << end) - (1u << begin));
  if constexpr (sizeof(T) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(mask, from + first);
  } else {
    T lanes[kLanes];
    _mm256_storeu_si256((__m256i*)lanes, _mm256_maskz_loadu_epi16(mask, from + first));
    return load(lanes);
  }
#else
  T lanes[kLanes] = {};
  for (int i = 0; i < kLanes; ++i) {
    if (first + i >= 0 && first + i < width) lanes[i] = from[first + i];
  }
  return load(lanes);
#endif
}

// Every second float of two vectors, from the first or from the second on.
template <int kFrom>
BRT_INLINE Vec half_of(Vec a, Vec b) {
#ifdef __AVX512F__
  const VecI pick = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
#else
  const VecI pick = {0, 2, 4, 6, 8, 10, 12, 14};
#endif
  return __builtin_shuffle(a, b, pick + kFrom);
}

// A row of the planes of each column phase rx: to[rx * plane + i] = from[i * stride + rx - padding] where that is in the
// image, else 0. Writes whole vectors, so up to one beyond the row: rows are made in the order in which they lie.
template <class T>
BRT_INLINE void read_row(float* to, int64_t row, int64_t plane, int64_t phases, const T* from, int64_t width,
                         int64_t stride, int64_t padding) {
  if (stride == 1) {
    for (int64_t i = 0; i < row; i += kLanes) store(to + i, load_window(from, i - padding, width));
  } else if (stride == 2) {
    for (int64_t i = 0; i < row; i += kLanes) {
      const int64_t first = 2 * i - padding;
      const Vec a = load_window(from, first, width), b = load_window(from, first + kLanes, width);
      store(to + i, half_of<0>(a, b));
      if (phases == 2) store(to + plane + i, half_of<1>(a, b));
    }
  } else {
    for (int64_t rx = 0; rx < phases; ++rx, to += plane) {
      for (int64_t i = 0; i < row; ++i) {
        const int64_t x = i * stride + rx - padding;
        to[i] = x >= 0 && x < width ? to_float(from[x]) : 0.0f;
      }
    }
  }
}

// The planes of the channels of one group.
template <class T>
void read_planes(const ConvTask& t, const Shape& s, int64_t first_channel, int64_t num_channels, float* planes) {
  for (int64_t c = 0; c < num_channels; ++c) {
    for (int64_t ry = 0; ry < s.phases; ++ry, planes += s.phases * s.plane) {
      float* to = planes;
      for (int64_t n = 0; n < t.num_cells; ++n) {
        const T* image = (const T*)t.x + (n * t.channels + first_channel + c) * t.height * t.width;
        for (int64_t j = 0; j < s.rows; ++j, to += s.row) {
          const int64_t y = (t.first_row + j) * t.stride + ry - t.padding;
          if (y >= 0 && y < t.height) {
            read_row(to, s.row, s.plane, s.phases, image + y * t.width, t.width, t.stride, t.padding);
          } else {
            for (int64_t rx = 0; rx < s.phases; ++rx) memset(to + rx * s.plane, 0, s.row * sizeof(float));
          }
        }
      }
    }
  }
}

// The same where planes are the images themselves: 1 x 1, stride 1, no padding.
template <class T>
void read_images(const ConvTask& t, const Shape& s, int64_t first_channel, int64_t num_channels, float* planes) {
  const int64_t size = s.rows * s.row;
  for (int64_t c = 0; c < num_channels; ++c) {
    for (int64_t n = 0; n < t.num_cells; ++n, planes += size) {
      const T* image = (const T*)t.x + (n * t.channels + first_channel + c) * t.height * t.width;
      read_row(planes, size, 0, 1, image + t.first_row * t.width, size, 1, 0);
    }
  }
}

// ---- Multiplying ----

struct Sums {
  const float* planes;
  int64_t channel, num_channels;
  const int64_t* taps;  // offset of each
  int64_t num_taps;
  const float* weight;  // of the first output channel
  int64_t weight_out;   // from one output channel to the next
  float* sums;          // [kOut][sums_out]
  int64_t sums_out;
};

template <int kOut, int kCount>
void tile(const Sums& s, int64_t at) {
  Vec total[kOut][kCount];
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) total[o][v] = Vec{};
  }
  const float* in = s.planes + at;
  const float* weight = s.weight;
  for (int64_t c = 0; c < s.num_channels; ++c, in += s.channel) {
    for (int64_t t = 0; t < s.num_taps; ++t, ++weight) {
      const float* from = in + s.taps[t];
      Vec x[kCount];
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) x[v] = load(from + v * kLanes);
#pragma GCC unroll 8
      for (int o = 0; o < kOut; ++o) {
        const Vec w = splat(weight[o * s.weight_out]);
#pragma GCC unroll 8
        for (int v = 0; v < kCount; ++v) total[o][v] += w * x[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOut; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) store(s.sums + o * s.sums_out + at + v * kLanes, total[o][v]);
  }
}

template <int kOut>
void multiply(const Sums& s, int64_t num_vectors) {
  int64_t v = 0;
  if constexpr (kOut == 1) {
    for (; v + kAloneVectors <= num_vectors; v += kAloneVectors) tile<kOut, kAloneVectors>(s, v * kLanes);
  }
  for (; v + kVectors <= num_vectors; v += kVectors) tile<kOut, kVectors>(s, v * kLanes);
  if (num_vectors - v == 2) tile<kOut, 2>(s, v * kLanes);
  if (num_vectors - v == 1) tile<kOut, 1>(s, v * kLanes);
}

void multiply_block(int64_t num_out, const Sums& s, int64_t num_vectors) {
  switch (num_out) {
    case 1: return multiply<1>(s, num_vectors);
    case 2: return multiply<2>(s, num_vectors);
    case 3: return multiply<3>(s, num_vectors);
    case 4: return multiply<4>(s, num_vectors);
#ifdef __AVX512F__
    case 5: return multiply<5>(s, num_vectors);
    case 6: return multiply<6>(s, num_vectors);
    case 7: return multiply<7>(s, num_vectors);
    case 8: return multiply<8>(s, num_vectors);
#endif
  }
}

// ---- Writing ----

template <class T>
BRT_INLINE Vec load_part(const T* p, int64_t count) {
#ifdef __AVX512F__
  const __mmask16 mask = (__mmask16)((1u << count) - 1);
  if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps(mask, p);
#endif
  T padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
BRT_INLINE void store_part(T* p, Vec v, int64_t count) {
#ifdef __AVX512F__
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#endif
  T padded[kLanes];
  store(padded, v);
  for (int64_t i = 0; i < count; ++i) p[i] = padded[i];
}

template <ConvActivation kAct>
BRT_INLINE Vec activate_image(Vec y, Vec slope) {
  switch (kAct) {
    case ConvActivation::kRelu: return y > 0.0f ? y : (y != y ? y : Vec{});
    case ConvActivation::kPrelu: return y > 0.0f ? y : y * slope;
    case ConvActivation::kSigmoid: return vsigmoid(y);
    case ConvActivation::kSilu: return y * vsigmoid(y);
    default: return y;
  }
}

// A row of the result: sums, bias and residual, activated.
template <class T, ConvActivation kAct>
BRT_INLINE void write_row(T* out, const float* sums, const T* residual, Vec bias, Vec slope, int64_t numel) {
  int64_t i = 0;
  for (; i + kLanes <= numel; i += kLanes) {
    Vec y = load(sums + i) + bias;
    if (residual) y += load(residual + i);
    store(out + i, activate_image<kAct>(y, slope));
  }
  if (i < numel) {
    Vec y = load(sums + i) + bias;  // sums end in whole vectors
    if (residual) y += load_part(residual + i, numel - i);
    store_part(out + i, activate_image<kAct>(y, slope), numel - i);
  }
}

template <class T, ConvActivation kAct>
void write_channel(const ConvTask& t, const Shape& s, int64_t o, const float* sums) {
  const Vec bias = splat(t.bias ? t.bias[o] : 0.0f);
  const Vec slope = splat(kAct == ConvActivation::kPrelu ? t.slope[o * t.slope_step] : 0.0f);
  for (int64_t n = 0; n < t.num_cells; ++n, sums += s.rows * s.row) {
    const int64_t at = ((n * t.out_channels + o) * t.out_height + t.first_row) * t.out_width;
    T* out = (T*)t.out + at;
    const T* residual = t.residual ? (const T*)t.residual + at : nullptr;
    if (s.reach == 0) {  // rows without a gap
      write_row<T, kAct>(out, sums, residual, bias, slope, t.num_rows * t.out_width);
      continue;
    }
    for (int64_t y = 0; y < t.num_rows; ++y) {
      const int64_t in_image = y * t.out_width;
      write_row<T, kAct>(out + in_image, sums + y * s.row, residual ? residual + in_image : nullptr, bias, slope,
                         t.out_width);
    }
  }
}

template <class T>
void write_activated(const ConvTask& t, const Shape& s, int64_t o, const float* sums) {
  switch (t.activation) {
    case ConvActivation::kNone: return write_channel<T, ConvActivation::kNone>(t, s, o, sums);
    case ConvActivation::kRelu: return write_channel<T, ConvActivation::kRelu>(t, s, o, sums);
    case ConvActivation::kPrelu: return write_channel<T, ConvActivation::kPrelu>(t, s, o, sums);
    case ConvActivation::kSigmoid: return write_channel<T, ConvActivation::kSigmoid>(t, s, o, sums);
    case ConvActivation::kSilu: return write_channel<T, ConvActivation::kSilu>(t, s, o, sums);
  }
}

// Floats of planes, with what the last vectors read past their end.
int64_t planes_numel(const ConvTask& t, const Shape& s) {
  return whole(t.channels / t.groups * s.channel + kLanes);
}

int64_t taps_numel(const ConvTask& t) { return whole(2 * t.kernel * t.kernel); }

template <class T>
void run(const ConvTask& t, float* scratch) {
  const Shape s(t, t.num_rows);
  // 1. Where each tap reads
  int64_t* taps = (int64_t*)scratch;
  int64_t* tap = taps;
  for (int64_t ky = 0; ky < t.kernel; ++ky) {
    for (int64_t kx = 0; kx < t.kernel; ++kx) {
      *tap++ = (ky % t.stride * s.phases + kx % t.stride) * s.plane + ky / t.stride * s.row + kx / t.stride;
    }
  }
  float* planes = scratch + taps_numel(t);
  float* sums = planes + planes_numel(t, s);
  const int64_t num_in = t.channels / t.groups, num_out = t.out_channels / t.groups, num_taps = t.kernel * t.kernel;
  const int64_t num_blocks = (num_out + kMaxOut - 1) / kMaxOut;
  const bool images = t.kernel == 1 && t.stride == 1;
  // 2. Each group: its planes, then blocks of its output channels, as even as they can be
  for (int64_t g = 0; g < t.groups; ++g) {
    if (images) {
      read_images<T>(t, s, g * num_in, num_in, planes);
    } else {
      read_planes<T>(t, s, g * num_in, num_in, planes);
    }
    int64_t o = g * num_out;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t size = num_out / num_blocks + (b < num_out % num_blocks);
      const Sums block{planes, s.channel, num_in, taps, num_taps, t.weight + o * num_in * num_taps,
                       num_in * num_taps, sums, s.num_vectors * kLanes};
      multiply_block(size, block, s.num_vectors);
      for (int64_t i = 0; i < size; ++i) write_activated<T>(t, s, o + i, sums + i * block.sums_out);
      o += size;
    }
  }
}

}  // namespace

// Rows of the result that a piece of one cell takes, so that its planes stay in cache.
int64_t conv_task_rows(const ConvTask& task) {
  ConvTask t = task;
  t.num_cells = 1;
  const Shape one(t, 1);
  const int64_t of_row = t.channels / t.groups * one.phases * one.phases * one.row;
  const int64_t near = kNearNumel / of_row - one.reach, most = kMostNumel / of_row - one.reach;
  const int64_t rows = near >= kFewRows ? near : min_of(kFewRows, max_of(most, 1));
  return min_of(rows, t.out_height);
}

int64_t conv_task_scratch_numel(const ConvTask& t) {
  const Shape s(t, t.num_rows);
  // Lanes past the long row's last vector read up to a vector beyond the planes: see planes_numel
  return taps_numel(t) + planes_numel(t, s) + kMaxOut * s.num_vectors * kLanes + kLanes;
}

void conv_task(const ConvTask& task, float* scratch) {
  switch (task.type) {
    case Real::kFloat32: return run<float>(task, scratch);
    case Real::kFloat16: return run<F16>(task, scratch);
    case Real::kBFloat16: return run<BF16>(task, scratch);
  }
}

}  // namespace brt::BRT_ISA
