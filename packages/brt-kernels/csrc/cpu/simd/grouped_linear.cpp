// Rows times the rows of a weight: both lie along the features that are summed, so a vector holds parts of one sum
// and is added up across at the end.
//
// NOTES: Rows of a power-of-two length all fall into one set of the first cache. From kPackRows rows on, rows are
// therefore copied side by side, which also lets the copy take the gather and the padding of the last vector.
#include "grouped_linear.h"

#include "vec.h"

namespace brt::BRT_ISA {
namespace {

#ifdef __AVX512F__
constexpr int kMaxRows = 6, kOut = 4;  // 24 sums of 32 registers
#else
constexpr int kMaxRows = 3, kOut = 4;  // 12 of 16
#endif
constexpr int64_t kPackRows = 13;                   // fewer are read where they lie
constexpr int64_t kPackBytes = int64_t{320} << 10;  // packed rows stay in the second cache

// How elements are multiplied: kStep of them in one step, with the tail of a row read as zeros.
template <class T>
struct Dot {
  using Reg = Vec;
  static constexpr int64_t kStep = kLanes;
  static BRT_INLINE Reg get(const T* p) { return load(p); }
  static BRT_INLINE Reg get_tail(const T* p, int64_t count) {
    T padded[kStep] = {};
    memcpy(padded, p, count * sizeof(T));
    return load(padded);
  }
  static BRT_INLINE void add(Vec& sum, Reg a, Reg b) { sum += a * b; }
};

#ifdef __AVX512BF16__
template <>
struct Dot<BF16> {
  using Reg = __m512i;
  static constexpr int64_t kStep = 32;
  static BRT_INLINE Reg get(const BF16* p) { return _mm512_loadu_si512(p); }
  static BRT_INLINE Reg get_tail(const BF16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
  }
  static BRT_INLINE void add(Vec& sum, Reg a, Reg b) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The sums of four vectors.
BRT_INLINE __m128 sum4(Vec a, Vec b, Vec c, Vec d) {
#ifdef __AVX512F__
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  const __m512 abcd =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
#else
  const __m256 half = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// kRows rows times kOut rows of the weight, into sums[row * stride + o]. Rows are at x_rows, or side by side at
// `packed`, a step of each in turn. Meanwhile it fetches what is needed next: kOut rows from `fetch` on where the rows
// are few, one where they are packed, as other groups of rows then fetch the others.
template <class T, int kRows, bool kPacked>
void tile(const T* const* x_rows, const T* packed, const T* weight, int64_t num_in, const T* fetch, float* sums,
          int64_t stride) {
  using D = Dot<T>;
  Vec total[kRows][kOut];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) total[r][o] = Vec{};
  }
  const T* rows[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) rows[r] = kPacked ? packed + r * D::kStep : x_rows[r];
  const int64_t whole = num_in / D::kStep * D::kStep;
  for (int64_t k = 0; k < whole; k += D::kStep) {
    typename D::Reg w[kOut];
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) {
      w[o] = D::get(weight + o * num_in + k);
      if (!kPacked || o == 0) __builtin_prefetch(fetch + o * num_in + k, 0, 2);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const typename D::Reg x = D::get(kPacked ? rows[r] + k * kRows : rows[r] + k);
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) D::add(total[r][o], x, w[o]);
    }
  }
  if (whole < num_in) {
    const int64_t count = num_in - whole;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const typename D::Reg x = kPacked ? D::get(rows[r] + whole * kRows) : D::get_tail(rows[r] + whole, count);
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) D::add(total[r][o], x, D::get_tail(weight + o * num_in + whole, count));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    _mm_storeu_ps(sums + r * stride, sum4(total[r][0], total[r][1], total[r][2], total[r][3]));
  }
}

// The same for a last feature that has no three neighbours.
template <class T, bool kPacked>
void column(const T* const* x_rows, const T* packed, int64_t num_rows, const T* weight, int64_t num_in, float* sums,
            int64_t stride) {
  using D = Dot<T>;
  for (int64_t r = 0; r < num_rows; ++r) {
    Vec total = {};
    int64_t k = 0;
    for (; k + D::kStep <= num_in; k += D::kStep) {
      D::add(total, D::get(kPacked ? packed + r * D::kStep + k * num_rows : x_rows[r] + k), D::get(weight + k));
    }
    if (k < num_in) {
      const typename D::Reg x =
          kPacked ? D::get(packed + r * D::kStep + k * num_rows) : D::get_tail(x_rows[r] + k, num_in - k);
      D::add(total, x, D::get_tail(weight + k, num_in - k));
    }
    sums[r * stride] = sum(total);
  }
}

template <class T, bool kPacked>
void tile_of(int64_t num_rows, const T* const* x_rows, const T* packed, const T* weight, int64_t num_in, const T* fetch,
             float* sums, int64_t stride) {
  switch (num_rows) {
    case 1: return tile<T, 1, kPacked>(x_rows, packed, weight, num_in, fetch, sums, stride);
    case 2: return tile<T, 2, kPacked>(x_rows, packed, weight, num_in, fetch, sums, stride);
    case 3: return tile<T, 3, kPacked>(x_rows, packed, weight, num_in, fetch, sums, stride);
#ifdef __AVX512F__
    case 4: return tile<T, 4, kPacked>(x_rows, packed, weight, num_in, fetch, sums, stride);
    case 5: return tile<T, 5, kPacked>(x_rows, packed, weight, num_in, fetch, sums, stride);
    case 6: return tile<T, 6, kPacked>(x_rows, packed, weight, num_in, fetch, sums, stride);
#endif
  }
}

// Rows in groups of nearly equal size.
struct Groups {
  int64_t count, base, extra;
  explicit Groups(int64_t num_rows) {
    count = (num_rows + kMaxRows - 1) / kMaxRows;
    base = count ? num_rows / count : 0;
    extra = count ? num_rows % count : 0;
  }
  int64_t size(int64_t i) const { return base + (i < extra); }
};

template <class T>
int64_t padded(int64_t num_in) {
  return (num_in + Dot<T>::kStep - 1) / Dot<T>::kStep * Dot<T>::kStep;
}

template <class T>
void pack_group(T* packed, const T* const* x_rows, int64_t num_rows, int64_t num_in) {
  constexpr int64_t kStep = Dot<T>::kStep;
  for (int64_t k = 0; k < num_in; k += kStep) {
    for (int64_t r = 0; r < num_rows; ++r, packed += kStep) {
      if (k + kStep <= num_in) {
        memcpy(packed, x_rows[r] + k, kStep * sizeof(T));
      } else {
        memset(packed, 0, kStep * sizeof(T));
        memcpy(packed, x_rows[r] + k, (num_in - k) * sizeof(T));
      }
    }
  }
}

// sums[r, o] = <x[r], weight[o]>
template <class T, bool kPacked>
void multiply(const T* const* x_rows, const T* packed, int64_t num_rows, const T* weight, int64_t num_in,
              int64_t num_out, float* sums, int64_t stride) {
  const Groups groups(num_rows);
  for (int64_t o = 0; o < num_out; o += kOut) {
    const T* w = weight + o * num_in;
    const T* from = packed;
    for (int64_t g = 0, r = 0; g < groups.count; r += groups.size(g++)) {
      const int64_t size = groups.size(g);
      float* to = sums + r * stride + o;
      const T* const* rows = kPacked ? nullptr : x_rows + r;
      if (o + kOut <= num_out) {
        const bool more = o + 2 * kOut <= num_out && g < (kPacked ? kOut : 1);
        const T* fetch = more ? w + (kOut + (kPacked ? g : 0)) * num_in : w;
        tile_of<T, kPacked>(size, rows, from, w, num_in, fetch, to, stride);
      } else {
        for (int64_t i = o; i < num_out; ++i) {
          column<T, kPacked>(rows, from, size, weight + i * num_in, num_in, to + i - o, stride);
        }
      }
      if (kPacked) from += size * padded<T>(num_in);
    }
  }
}

template <class T, class Out>
void finish_row(Out* out, const float* sums, const float* up_sums, const T* bias, const T* up_bias, int64_t num_out,
                Activation activation) {
  const auto part = [&](int64_t o, int64_t count) {
    Vec value, other = {};
    if (count == kLanes) {
      value = load(sums + o) + (bias ? load(bias + o) : Vec{});
      if (up_sums) other = load(up_sums + o) + (up_bias ? load(up_bias + o) : Vec{});
    } else {
      float a[kLanes] = {}, b[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        a[i] = sums[o + i] + (bias ? to_float(bias[o + i]) : 0.0f);
        if (up_sums) b[i] = up_sums[o + i] + (up_bias ? to_float(up_bias[o + i]) : 0.0f);
      }
      value = load(a);
      other = load(b);
    }
    value = up_sums ? activate(value, Activation::kSilu) * other : activate(value, activation);
    if (count == kLanes) {
      store(out + o, value);
    } else {
      Out last[kLanes];
      store(last, value);
      memcpy(out + o, last, count * sizeof(Out));
    }
  };
  int64_t o = 0;
  for (; o + kLanes <= num_out; o += kLanes) part(o, kLanes);
  if (o < num_out) part(o, num_out - o);
}

// Rows that are worked on together.
template <class T>
int64_t chunk_of(int64_t num_rows, int64_t num_in) {
  if (num_rows < kPackRows) return num_rows;
  int64_t fit = kPackBytes / (int64_t)(padded<T>(num_in) * sizeof(T)) / kMaxRows * kMaxRows;
  if (fit < 2 * kMaxRows) fit = 2 * kMaxRows;
  const int64_t parts = (num_rows + fit - 1) / fit;
  return (num_rows + parts - 1) / parts;
}

template <class T>
void run(const GroupTask& task, void* scratch) {
  const T* const* x_rows = (const T* const*)task.x_rows;
  const T* weight = (const T*)task.weight;
  const T* bias = (const T*)task.bias;
  const bool gated = task.activation == Activation::kSwiglu;
  const int64_t chunk = chunk_of<T>(task.num_rows, task.num_in);
  const int64_t stride = (task.num_out + 15) / 16 * 16;
  float* sums = (float*)scratch;
  float* up_sums = gated ? sums + chunk * stride : nullptr;
  T* packed = (T*)(sums + (gated ? 2 : 1) * chunk * stride);
  for (int64_t first = 0; first < task.num_rows; first += chunk) {
    const int64_t num_rows = task.num_rows - first < chunk ? task.num_rows - first : chunk;
    const bool packs = task.num_rows >= kPackRows;
    // 1. Rows side by side
    if (packs) {
      const Groups groups(num_rows);
      T* to = packed;
      for (int64_t g = 0, r = 0; g < groups.count; r += groups.size(g++)) {
        pack_group(to, x_rows + first + r, groups.size(g), task.num_in);
        to += groups.size(g) * padded<T>(task.num_in);
      }
    }
    // 2. Products
    for (int half = 0; half < (gated ? 2 : 1); ++half) {
      const T* w = weight + half * task.up * task.num_in;
      float* to = half ? up_sums : sums;
      if (packs) {
        multiply<T, true>(nullptr, packed, num_rows, w, task.num_in, task.num_out, to, stride);
      } else {
        multiply<T, false>(x_rows + first, nullptr, num_rows, w, task.num_in, task.num_out, to, stride);
      }
    }
    // 3. Bias, activation, result
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* up = gated ? up_sums + r * stride : nullptr;
      const T* up_bias = bias && gated ? bias + task.up : nullptr;
      if (task.out_type == Real::kFloat32) {
        finish_row((float*)task.out_rows[first + r], sums + r * stride, up, bias, up_bias, task.num_out,
                   task.activation);
      } else {
        finish_row((T*)task.out_rows[first + r], sums + r * stride, up, bias, up_bias, task.num_out, task.activation);
      }
    }
  }
}

template <class T>
int64_t scratch_bytes(const GroupTask& task) {
  const int64_t chunk = chunk_of<T>(task.num_rows, task.num_in), stride = (task.num_out + 15) / 16 * 16;
  const int64_t sums = (task.activation == Activation::kSwiglu ? 2 : 1) * chunk * stride * (int64_t)sizeof(float);
  return sums + chunk * padded<T>(task.num_in) * (int64_t)sizeof(T);
}

}  // namespace

int64_t group_scratch_bytes(const GroupTask& task) {
  switch (task.type) {
    case Real::kFloat32: return scratch_bytes<float>(task);
    case Real::kFloat16: return scratch_bytes<F16>(task);
    case Real::kBFloat16: return scratch_bytes<BF16>(task);
  }
  return 0;
}

void group_task(const GroupTask& task, void* scratch) {
  switch (task.type) {
    case Real::kFloat32: return run<float>(task, scratch);
    case Real::kFloat16: return run<F16>(task, scratch);
    case Real::kBFloat16: return run<BF16>(task, scratch);
  }
}

}  // namespace brt::BRT_ISA
