// The options of route, checked: shared by the CPU and the CUDA library.
#pragma once

#include "check.h"

namespace brt {

struct RouteOptions {
  std::optional<std::vector<int64_t>> capacity;  // one value, or one a path
  int64_t group_size;                            // 0: all cells are one group
  int64_t multiple;                              // rows of a path are padded to a multiple of this
};

inline void check_mask(const Tensor& t, const char* name, int64_t rank) {
  BRT_CHECK(t.dim() == rank, name, " must be ", rank, "-D, got ", shape_of(t));
  const ScalarType type = t.scalar_type();
  BRT_CHECK(type == ScalarType::Bool || is_index(type) || type == ScalarType::Byte || type == ScalarType::Char,
            name, " must be bool or integers, got ", dtype_name(type));
}

inline RouteOptions checked_options(const Tensor& decision, int64_t num_paths,
                                    std::optional<std::vector<int64_t>> capacity,
                                    const std::optional<Tensor>& priority_N, int64_t group_size, int64_t multiple) {
  const int64_t num_cells = decision.size(0);
  BRT_CHECK(num_paths >= 0 && num_paths < (int64_t{1} << 31), "num_paths must be in [0, 2^31), got ", num_paths);
  BRT_CHECK(multiple >= 1 && multiple < (int64_t{1} << 31), "multiple must be in [1, 2^31), got ", multiple);
  BRT_CHECK(group_size >= 0, "group_size must be >= 0, got ", group_size);
  if (capacity) {
    const int64_t given = (int64_t)capacity->size();
    BRT_CHECK(given == 1 || given == num_paths, given, " capacities for ", num_paths, " paths; give 1 or P");
  }
  if (priority_N.has_value()) {
    BRT_CHECK(priority_N->dim() == 1 && priority_N->size(0) == num_cells, "priority_N must be [", num_cells,
              "], got ", shape_of(*priority_N));
    check_device(*priority_N, "priority_N", decision);
    const ScalarType type = priority_N->scalar_type();
    BRT_CHECK(is_real(type) || is_index(type) || type == ScalarType::Double,
              "priority_N must be real numbers, got ", dtype_name(type));
  }
  return {std::move(capacity), group_size, multiple};
}

}  // namespace brt
