// c = a @ b, by multiplying single values of a with vectors of b. a is first copied to panels: kMaxRows rows of it
// side by side, in float32.
#include "outer.h"

#include "vec.h"

namespace brt::BRT_ISA {
namespace {

#ifdef __AVX512F__
constexpr int kMaxRows = 6, kWide = 4;  // 24 sums of 32 registers
#else
constexpr int kMaxRows = 3, kWide = 4;  // 12 of 16
#endif
constexpr int64_t kPanelNumel = int64_t{64} << 10;  // floats of a that are in use at a time
constexpr int64_t kAhead = 8;                       // rows of b fetched ahead

template <class T>
BRT_INLINE Vec load_part(const T* p, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, p, count * sizeof(T));
  return load(padded);
}

// kRows rows of c, kVectors vectors of it; `count` columns of them where it is less than a vector.
template <class T, int kRows, int kVectors, bool kPart>
void tile(const float* panel, const T* b, int64_t b_row, int64_t num_sums, T* c, int64_t c_row, int64_t count) {
  Vec total[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) total[r][v] = Vec{};
  }
  for (int64_t k = 0; k < num_sums; ++k, panel += kRows, b += b_row) {
    Vec in[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      in[v] = kPart ? load_part(b, count) : load(b + v * kLanes);
      if (k + kAhead < num_sums) __builtin_prefetch(b + kAhead * b_row + v * kLanes);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] += panel[r] * in[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      if (kPart) {
        T last[kLanes];
        store(last, total[r][v]);
        memcpy(c + r * c_row, last, count * sizeof(T));
      } else {
        store(c + r * c_row + v * kLanes, total[r][v]);
      }
    }
  }
}

template <class T, int kVectors, bool kPart>
void tile_of(int64_t num_rows, const float* panel, const T* b, int64_t b_row, int64_t num_sums, T* c, int64_t c_row,
             int64_t count) {
  switch (num_rows) {
    case 1: return tile<T, 1, kVectors, kPart>(panel, b, b_row, num_sums, c, c_row, count);
    case 2: return tile<T, 2, kVectors, kPart>(panel, b, b_row, num_sums, c, c_row, count);
    case 3: return tile<T, 3, kVectors, kPart>(panel, b, b_row, num_sums, c, c_row, count);
#ifdef __AVX512F__
    case 4: return tile<T, 4, kVectors, kPart>(panel, b, b_row, num_sums, c, c_row, count);
    case 5: return tile<T, 5, kVectors, kPart>(panel, b, b_row, num_sums, c, c_row, count);
    case 6: return tile<T, 6, kVectors, kPart>(panel, b, b_row, num_sums, c, c_row, count);
#endif
  }
}

int64_t rows_of_chunk(int64_t num_rows, int64_t num_sums) {
  const int64_t fit = kPanelNumel / (num_sums > 0 ? num_sums : 1) / kMaxRows * kMaxRows;
  const int64_t chunk = fit > 4 * kMaxRows ? fit : 4 * kMaxRows;
  return chunk < num_rows ? chunk : num_rows;
}

template <class T>
void run(const OuterTask& task, float* panels) {
  const T *a = (const T*)task.a, *b = (const T*)task.b;
  T* c = (T*)task.c;
  const int64_t chunk = rows_of_chunk(task.num_rows, task.num_sums);
  for (int64_t first = 0; first < task.num_rows; first += chunk) {
    const int64_t last = first + chunk < task.num_rows ? first + chunk : task.num_rows;
    // 1. Panels of these rows
    float* to = panels;
    for (int64_t m = first; m < last; m += kMaxRows) {
      const int64_t size = last - m < kMaxRows ? last - m : kMaxRows;
      for (int64_t k = 0; k < task.num_sums; ++k) {
        for (int64_t r = 0; r < size; ++r) *to++ = to_float(a[(m + r) * task.a_row + k * task.a_column]);
      }
    }
    // 2. Each group of columns through all panels
    int64_t width = kWide * kLanes;
    for (int64_t n = 0; n < task.num_columns; n += width) {
      const int64_t left = task.num_columns - n;
      if (left < width) width = kLanes;
      const float* panel = panels;
      for (int64_t m = first; m < last; m += kMaxRows) {
        const int64_t size = last - m < kMaxRows ? last - m : kMaxRows;
        T* out = c + m * task.c_row + n;
        if (width > kLanes) {
          tile_of<T, kWide, false>(size, panel, b + n, task.b_row, task.num_sums, out, task.c_row, 0);
        } else if (left >= kLanes) {
          tile_of<T, 1, false>(size, panel, b + n, task.b_row, task.num_sums, out, task.c_row, 0);
        } else {
          tile_of<T, 1, true>(size, panel, b + n, task.b_row, task.num_sums, out, task.c_row, left);
        }
        panel += size * task.num_sums;
      }
    }
  }
}

}  // namespace

int64_t outer_scratch_numel(int64_t num_rows, int64_t num_sums) { return rows_of_chunk(num_rows, num_sums) * num_sums; }

void outer_task(const OuterTask& task, float* scratch) {
  switch (task.type) {
    case Real::kFloat32: return run<float>(task, scratch);
    case Real::kFloat16: return run<F16>(task, scratch);
    case Real::kBFloat16: return run<BF16>(task, scratch);
  }
}

}  // namespace brt::BRT_ISA
