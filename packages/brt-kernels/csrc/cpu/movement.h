// What the operators that move rows share: checked views of their index tensors.
#pragma once

#include "../check.h"
#include "isa.h"

namespace brt {

inline Real real_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Real::kFloat16;
    case ScalarType::BFloat16: return Real::kBFloat16;
    default: return Real::kFloat32;
  }
}

// Writes of more bytes than this go past the caches.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Rows a thread takes at least, so that starting it pays.
inline int64_t grain_of(int64_t row_bytes) { return row_bytes >= 65536 ? 1 : 65536 / (row_bytes + 1) + 1; }

// The first position whose value is not in [-1, limit), or -1.
inline int64_t first_outside(const int64_t* values, int64_t numel, int64_t limit) {
  for (int64_t i = 0; i < numel; ++i) {
    if (values[i] < -1 || values[i] >= limit) return i;
  }
  return -1;
}

inline void check_range(const Tensor& t, const char* name, int64_t limit) {
  const int64_t* values = t.const_data_ptr<int64_t>();
  const int64_t at = first_outside(values, t.numel(), limit);
  BRT_CHECK(at < 0, name, " must be in [-1, ", limit, "), got ", values[at < 0 ? 0 : at], " at position ", at);
}

// Weights of R rows as float32, or an undefined tensor where there are none.
inline std::optional<Tensor> checked_weights(const std::optional<Tensor>& weight_R, int64_t num_rows,
                                             const Tensor& like) {
  if (!weight_R.has_value()) return std::nullopt;
  check_real(*weight_R, "weight_R");
  check_device(*weight_R, "weight_R", like);
  BRT_CHECK(weight_R->dim() == 1 && weight_R->size(0) == num_rows, "weight_R must be [", num_rows, "], got ",
            shape_of(*weight_R));
  return as_float32(*weight_R);
}

}  // namespace brt
