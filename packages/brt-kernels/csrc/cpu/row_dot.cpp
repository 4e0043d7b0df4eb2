// row_dot: out[r] = <rows[r], cells[cell[r]]>, zero where cell[r] < 0: the gradient of the weights of rows.
// N cells, S trailing cell sizes, R rows, K choices.
#include "movement.h"

namespace brt {

Tensor row_dot_cpu(const Tensor& rows, const Tensor& cells, const Tensor& cell, const Tensor& row) {
  // 1. Shapes and values
  BRT_CHECK(rows.dim() >= 1 && cells.dim() == rows.dim(), "rows_RS and cells_NS must have the same rank, got ",
            shape_of(rows), " and ", shape_of(cells));
  for (int64_t i = 1; i < rows.dim(); ++i) {
    BRT_CHECK(rows.size(i) == cells.size(i), "rows_RS and cells_NS differ in size ", i, ": ", shape_of(rows), ", ",
              shape_of(cells));
  }
  check_real(rows, "rows_RS");
  BRT_CHECK(cells.scalar_type() == rows.scalar_type(), "cells_NS must be ", dtype_name(rows.scalar_type()), ", got ",
            dtype_name(cells.scalar_type()));
  check_index(cell, "cell_R", 1);
  check_index(row, "row_NK", 2);
  check_device(cells, "cells_NS", rows);
  check_device(cell, "cell_R", rows);
  const int64_t num_rows = rows.size(0);
  BRT_CHECK(cell.size(0) == num_rows, "cell_R must be [", num_rows, "], got ", shape_of(cell));
  const Tensor rows_RS = as_contiguous(rows), cells_NS = as_contiguous(cells), cell_R = as_int64(cell);
  check_range(cell_R, "cell_R", cells.size(0));

  // 2. One product a row
  Tensor out_R = new_empty(rows_RS, {num_rows}, ScalarType::Float);
  const int64_t numel = row_numel(rows_RS), row_bytes = numel * (int64_t)rows.element_size();
  const char* a = static_cast<const char*>(rows_RS.const_data_ptr());
  const char* b = static_cast<const char*>(cells_NS.const_data_ptr());
  const int64_t* index = cell_R.const_data_ptr<int64_t>();
  float* out = out_R.mutable_data_ptr<float>();
  const Real type = real_of(rows);
  const Kernels& k = kernels();
  torch::stable::parallel_for(0, num_rows, grain_of(row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      out[r] = index[r] < 0 ? 0.0f : k.dot_row(a + r * row_bytes, b + index[r] * row_bytes, numel, type);
    }
  });
  return out_R;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("row_dot", TORCH_BOX(&row_dot_cpu)); }

}  // namespace brt
