// Whole rows: copied, scaled, summed.
//
// NOTES: A streaming store does not read the line that it overwrites, which is a third of the traffic of a
// copy, but it leaves the result out of the caches: callers stream only what is larger than a cache.
#include "rows.h"

namespace brt::BRT_ISA {
namespace {

constexpr int64_t kLine = 64;

// Bytes before the first whole line of dst, at most num_bytes.
BRT_INLINE int64_t head_of(const void* dst, int64_t num_bytes) {
  const int64_t head = (kLine - (int64_t)((uintptr_t)dst % kLine)) % kLine;
  return head < num_bytes ? head : num_bytes;
}

BRT_INLINE void stream_line(char* dst, const char* src) {
#ifdef __AVX512F__
  _mm512_stream_si512((__m512i*)dst, _mm512_loadu_si512(src));
#else
  _mm256_stream_si256((__m256i*)dst, _mm256_loadu_si256((const __m256i*)src));
  _mm256_stream_si256((__m256i*)(dst + 32), _mm256_loadu_si256((const __m256i*)(src + 32)));
#endif
}

// One line of elements, made by `make(i)` = the vector at element i, written at dst + i.
template <class T, class Make>
BRT_INLINE void stream_elements(T* dst, int64_t i, const Make& make) {
  alignas(64) T line[kLine / sizeof(T)];
  for (int64_t j = 0; j < (int64_t)(kLine / sizeof(T)); j += kLanes) store(line + j, make(i + j));
  stream_line((char*)(dst + i), (const char*)line);
}

// dst[i] = make(i) over numel; `make_one(i)` is its scalar form for the ends.
template <class T, class Make, class MakeOne>
BRT_INLINE void fill(T* dst, int64_t numel, bool stream, const Make& make, const MakeOne& make_one) {
  int64_t i = 0;
  if (stream && (uintptr_t)dst % sizeof(T) == 0) {
    const int64_t head = head_of(dst, numel * (int64_t)sizeof(T)) / (int64_t)sizeof(T);
    for (; i < head; ++i) dst[i] = from_float<T>(make_one(i));
    constexpr int64_t kStep = kLine / sizeof(T);
    for (; i + kStep <= numel; i += kStep) stream_elements(dst, i, make);
  } else {
    for (; i + kLanes <= numel; i += kLanes) store(dst + i, make(i));
  }
  for (; i < numel; ++i) dst[i] = from_float<T>(make_one(i));
}

template <class T>
void scale(T* dst, const T* src, float weight, int64_t numel, bool stream) {
  fill(dst, numel, stream, [&](int64_t i) BRT_LAMBDA { return weight * load(src + i); },
       [&](int64_t i) BRT_LAMBDA { return weight * to_float(src[i]); });
}

template <class T, class S, int kRows, bool kWeighted>
void sum_fixed(T* dst, const S* const* rows, const float* weights, int64_t numel, bool stream) {
  fill(
      dst, numel, stream,
      [&](int64_t i) BRT_LAMBDA {
        Vec total = kWeighted ? weights[0] * load(rows[0] + i) : load(rows[0] + i);
        for (int k = 1; k < kRows; ++k) total += kWeighted ? weights[k] * load(rows[k] + i) : load(rows[k] + i);
        return total;
      },
      [&](int64_t i) BRT_LAMBDA {
        float total = kWeighted ? weights[0] * to_float(rows[0][i]) : to_float(rows[0][i]);
        for (int k = 1; k < kRows; ++k) {
          total += kWeighted ? weights[k] * to_float(rows[k][i]) : to_float(rows[k][i]);
        }
        return total;
      });
}

template <class T, class S>
void sum_any(T* dst, const S* const* rows, const float* weights, int64_t num_rows, int64_t numel, bool stream) {
  fill(
      dst, numel, stream,
      [&](int64_t i) BRT_LAMBDA {
        Vec total = {};
        for (int64_t k = 0; k < num_rows; ++k) total += (weights ? weights[k] : 1.0f) * load(rows[k] + i);
        return total;
      },
      [&](int64_t i) BRT_LAMBDA {
        float total = 0;
        for (int64_t k = 0; k < num_rows; ++k) total += (weights ? weights[k] : 1.0f) * to_float(rows[k][i]);
        return total;
      });
}

template <class T, class S>
void sum_of(void* out, const void* const* in, const float* weights, int64_t num_rows, int64_t numel, bool stream) {
  T* dst = (T*)out;
  const S* const* rows = (const S* const*)in;
  if (num_rows == 1 && weights) return sum_fixed<T, S, 1, true>(dst, rows, weights, numel, stream);
  if (num_rows == 2 && weights) return sum_fixed<T, S, 2, true>(dst, rows, weights, numel, stream);
  if (num_rows == 4 && weights) return sum_fixed<T, S, 4, true>(dst, rows, weights, numel, stream);
  if (num_rows == 2) return sum_fixed<T, S, 2, false>(dst, rows, weights, numel, stream);
  return sum_any<T, S>(dst, rows, weights, num_rows, numel, stream);
}

template <class T>
float dot(const T* a, const T* b, int64_t numel) {
  Vec total[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= numel; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) total[j] += load(a + i + j * kLanes) * load(b + i + j * kLanes);
  }
  for (; i + kLanes <= numel; i += kLanes) total[0] += load(a + i) * load(b + i);
  float result = sum((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < numel; ++i) result += to_float(a[i]) * to_float(b[i]);
  return result;
}

}  // namespace

void copy_row(void* to, const void* from, int64_t num_bytes, bool stream) {
  if (!stream) {
    memcpy(to, from, num_bytes);
    return;
  }
  char* dst = (char*)to;
  const char* src = (const char*)from;
  const int64_t head = head_of(dst, num_bytes);
  memcpy(dst, src, head);
  int64_t i = head;
  for (; i + 4 * kLine <= num_bytes; i += 4 * kLine) {
    for (int64_t j = 0; j < 4 * kLine; j += kLine) stream_line(dst + i + j, src + i + j);
  }
  for (; i + kLine <= num_bytes; i += kLine) stream_line(dst + i, src + i);
  memcpy(dst + i, src + i, num_bytes - i);
}

void zero_row(void* to, int64_t num_bytes, bool stream) {
  if (!stream) {
    memset(to, 0, num_bytes);
    return;
  }
  static const char zeros[kLine] = {};
  char* dst = (char*)to;
  int64_t i = head_of(dst, num_bytes);
  memset(dst, 0, i);
  for (; i + kLine <= num_bytes; i += kLine) stream_line(dst + i, zeros);
  memset(dst + i, 0, num_bytes - i);
}

void scale_row(void* dst, const void* src, float weight, int64_t numel, Real type, bool stream) {
  switch (type) {
    case Real::kFloat32: return scale((float*)dst, (const float*)src, weight, numel, stream);
    case Real::kFloat16: return scale((F16*)dst, (const F16*)src, weight, numel, stream);
    case Real::kBFloat16: return scale((BF16*)dst, (const BF16*)src, weight, numel, stream);
  }
}

void sum_rows(void* dst, const void* const* rows, const float* weights, int64_t num_rows, int64_t numel, Real type,
              bool stream) {
  switch (type) {
    case Real::kFloat32: return sum_of<float, float>(dst, rows, weights, num_rows, numel, stream);
    case Real::kFloat16: return sum_of<F16, F16>(dst, rows, weights, num_rows, numel, stream);
    case Real::kBFloat16: return sum_of<BF16, BF16>(dst, rows, weights, num_rows, numel, stream);
  }
}

void sum_float_rows(void* dst, const float* const* in, const float* weights, int64_t num_rows, int64_t numel,
                    Real type) {
  const void* const* rows = (const void* const*)in;
  switch (type) {
    case Real::kFloat32: return sum_of<float, float>(dst, rows, weights, num_rows, numel, false);
    case Real::kFloat16: return sum_of<F16, float>(dst, rows, weights, num_rows, numel, false);
    case Real::kBFloat16: return sum_of<BF16, float>(dst, rows, weights, num_rows, numel, false);
  }
}

float dot_row(const void* a, const void* b, int64_t numel, Real type) {
  switch (type) {
    case Real::kFloat32: return dot((const float*)a, (const float*)b, numel);
    case Real::kFloat16: return dot((const F16*)a, (const F16*)b, numel);
    case Real::kBFloat16: return dot((const BF16*)a, (const BF16*)b, numel);
  }
  return 0;
}

void fence() { _mm_sfence(); }

}  // namespace brt::BRT_ISA
