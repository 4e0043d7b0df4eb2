// One vector of floats, as wide as the instruction set that this file is built for.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace brt::BRT_ISA {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecW __attribute__((vector_size(kLanes * 4)));

#define BRT_INLINE inline __attribute__((always_inline))
#define BRT_LAMBDA __attribute__((always_inline))

BRT_INLINE Vec splat(float x) { return x - Vec{}; }
BRT_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
BRT_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

// Element types: float32 as it is, the halves as their 16 bits.
struct F16 { uint16_t bits; };
struct BF16 { uint16_t bits; };

BRT_INLINE float to_float(float x) { return x; }
BRT_INLINE float to_float(F16 x) { return _cvtsh_ss(x.bits); }
BRT_INLINE float to_float(BF16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
template <class T> BRT_INLINE T from_float(float x);
template <> BRT_INLINE float from_float<float>(float x) { return x; }
template <> BRT_INLINE F16 from_float<F16>(float x) { return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))}; }
template <> BRT_INLINE BF16 from_float<BF16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

BRT_INLINE Vec load(const F16* p) {
#ifdef __AVX512F__
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
BRT_INLINE void store(F16* p, Vec v) {
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}
BRT_INLINE Vec load(const BF16* p) {
#ifdef __AVX512F__
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#endif
}
BRT_INLINE void store(BF16* p, Vec v) {
  const VecW bits = (VecW)v;
  VecW rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = v != v ? VecW{} + 0x7fc0 : rounded;
#ifdef __AVX512F__
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)rounded));
#else
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)rounded, (__m256i)rounded), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#endif
}

BRT_INLINE float sum(Vec v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
#endif
}

BRT_INLINE Vec vmax(Vec a, Vec b) {
#ifdef __AVX512F__
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}
BRT_INLINE Vec vmin(Vec a, Vec b) {
#ifdef __AVX512F__
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#endif
}

// exp to 2 ulp: 2^round(x / ln 2) times a polynomial of the rest. Saturates; NaN stays NaN.
BRT_INLINE Vec vexp(Vec x) {
  const Vec clipped = vmin(splat(88.3762626647949f), vmax(splat(-87.3365478515625f), x));
  const Vec shifted = clipped * 1.44269504088896341f + 12582912.0f;  // round to nearest by 1.5 * 2^23
  const VecI exponent = (VecI)shifted - 0x4b400000;
  const Vec whole = shifted - 12582912.0f;
  Vec r = clipped - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Vec result = (Vec)((VecI)y + (exponent << 23));
  return x != x ? x : result;
}

BRT_INLINE Vec vsigmoid(Vec x) { return 1.0f / (1.0f + vexp(-x)); }

// erf by Abramowitz and Stegun 7.1.26 in |x|, 1.5e-7 absolute.
BRT_INLINE Vec verf(Vec x) {
  const Vec a = x < 0.0f ? -x : x;
  const Vec t = 1.0f / (1.0f + 0.3275911f * a);
  Vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Vec e = 1.0f - p * t * vexp(-(a * a));
  return x < 0.0f ? -e : e;
}

BRT_INLINE Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::kRelu: return x > 0.0f ? x : (x != x ? x : Vec{});
    case Activation::kGelu: return 0.5f * x * (1.0f + verf(x * 0.70710678118654752f));
    case Activation::kGeluTanh: {
      const Vec inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
      return x * vsigmoid(2.0f * inner);  // 0.5 * (1 + tanh(y)) = sigmoid(2 y)
    }
    case Activation::kSilu: return x * vsigmoid(x);
    default: return x;
  }
}

}  // namespace brt::BRT_ISA
