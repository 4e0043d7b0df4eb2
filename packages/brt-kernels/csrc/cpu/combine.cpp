// combine: out[n] = sum over k of weight[row[n, k]] * rows[row[n, k]].
// N cells, S trailing cell sizes, R rows, K choices.
#include "movement.h"

namespace brt {
Tensor combine_cpu(const Tensor& rows, const Tensor& row, const Tensor& cell, const std::optional<Tensor>& weight) {
  // 1. Shapes and values
  BRT_CHECK(rows.dim() >= 1, "rows_RS must have at least 1 dimension, got a scalar");
  check_real(rows, "rows_RS");
  check_index(row, "row_NK", 2);
  check_index(cell, "cell_R", 1);
  check_device(row, "row_NK", rows);
  check_device(cell, "cell_R", rows);
  const int64_t num_rows = rows.size(0), num_cells = row.size(0), num_choices = row.size(1);
  BRT_CHECK(cell.size(0) == num_rows, "cell_R must be [", num_rows, "], got ", shape_of(cell));
  const auto weight_R = checked_weights(weight, num_rows, rows);
  const Tensor rows_RS = as_contiguous(rows), row_NK = as_int64(row);
  check_range(row_NK, "row_NK", num_rows);

  // 2. Room
  Tensor out_NS = new_empty(rows_RS, with_rows(rows_RS, num_cells), rows.scalar_type());
  const int64_t numel = row_numel(rows_RS), row_bytes = numel * (int64_t)rows.element_size();
  if (num_cells == 0 || numel == 0) return out_NS;
  const char* from = static_cast<const char*>(rows_RS.const_data_ptr());
  char* to = static_cast<char*>(out_NS.mutable_data_ptr());
  const int64_t* index = row_NK.const_data_ptr<int64_t>();
  const float* weights = weight_R ? weight_R->const_data_ptr<float>() : nullptr;
  const Real type = real_of(rows);
  const bool stream = num_cells * row_bytes > kStreamBytes;
  const Kernels& k = kernels();

  // 3. Sum, cell by cell
  torch::stable::parallel_for(0, num_cells, grain_of(row_bytes * (num_choices + 1)), [&](int64_t begin, int64_t end) {
    std::vector<const void*> sources(num_choices);
    std::vector<float> factors(num_choices);
    for (int64_t n = begin; n < end; ++n) {
      int64_t count = 0;
      for (int64_t i = 0; i < num_choices; ++i) {
        const int64_t r = index[n * num_choices + i];
        if (r < 0) continue;
        sources[count] = from + r * row_bytes;
        factors[count++] = weights ? weights[r] : 1.0f;
      }
      char* dst = to + n * row_bytes;
      if (count == 0) {
        k.zero_row(dst, row_bytes, stream);
      } else if (count == 1 && !weights) {
        k.copy_row(dst, sources[0], row_bytes, stream);
      } else {
        k.sum_rows(dst, sources.data(), weights ? factors.data() : nullptr, count, numel, type, stream);
      }
    }
    k.fence();
  });
  return out_NS;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("combine", TORCH_BOX(&combine_cpu)); }

}  // namespace brt
