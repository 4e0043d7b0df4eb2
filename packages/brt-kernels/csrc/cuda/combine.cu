// combine: out[n] = sum over k of weight[row[n, k]] * rows[row[n, k]].
// N cells, S trailing cell sizes, R rows, K choices.
#include "combine.cuh"

namespace brt {

Tensor combine_cuda(const Tensor& rows, const Tensor& row, const Tensor& cell, const std::optional<Tensor>& weight) {
  BRT_CHECK(rows.dim() >= 1, "rows_RS must have at least 1 dimension, got a scalar");
  check_real(rows, "rows_RS");
  check_index(row, "row_NK", 2);
  check_index(cell, "cell_R", 1);
  check_device(row, "row_NK", rows);
  check_device(cell, "cell_R", rows);
  const OnDevice device(rows);
  const int64_t num_rows = rows.size(0), num_cells = row.size(0), num_choices = row.size(1);
  BRT_CHECK(cell.size(0) == num_rows, "cell_R must be [", num_rows, "], got ", shape_of(cell));
  const auto weight_R = checked_row_weights(weight, num_rows, rows);
  const Tensor rows_RS = as_contiguous(rows), row_NK = as_int64(row);
  Tensor out_NS = new_empty(rows_RS, with_rows(rows_RS, num_cells), rows.scalar_type());
  const int64_t numel = row_numel(rows_RS);
  if (num_cells == 0 || numel == 0) return out_NS;
  with_real(rows, [&](auto zero) {
    using T = decltype(zero);
    launch_sum_rows<T>(mutable_data_of<T>(out_NS), data_of<T>(rows_RS), data_of<int64_t>(row_NK),
                       weight_R ? data_of<float>(*weight_R) : nullptr, num_cells, num_rows, num_choices, numel,
                       Where::kCombineRow, device.stream());
  });
  BRT_LAUNCHED();
  return out_NS;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("combine", TORCH_BOX(&combine_cuda)); }

}  // namespace brt
