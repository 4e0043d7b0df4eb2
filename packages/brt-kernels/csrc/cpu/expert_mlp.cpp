// expert_mlp: gather -> up -> activation -> down -> weighted combine. Rows are read where the cells lie, the
// activation and the gate are applied where the products are made, and only the hidden rows and the results of the
// paths are kept between.
// N cells, K choices, R rows, P paths, D H features.
#include "grouped.h"

#include <algorithm>

namespace brt {

Tensor expert_mlp_cpu(const Tensor& x, const Tensor& cell, const Tensor& row, const Tensor& offsets,
                      const std::optional<Tensor>& weight, const Tensor& up, const std::optional<Tensor>& up_bias,
                      const Tensor& down, const std::optional<Tensor>& down_bias, std::string activation) {
  // 1. Shapes and values
  BRT_CHECK(x.dim() == 2, "x_ND must be 2-D, got ", shape_of(x));
  check_real(x, "x_ND");
  check_index(cell, "cell_R", 1);
  check_index(row, "row_NK", 2);
  check_index(offsets, "offsets_P1", 1);
  for (const Tensor& t : {cell, row, offsets}) check_device(t, "an index tensor", x);
  BRT_CHECK(offsets.size(0) >= 1, "offsets_P1 must have at least one entry");
  BRT_CHECK(row.size(0) == x.size(0), "row_NK must have a row for each of ", x.size(0), " cells, got ", shape_of(row));
  const Activation act = activation_of(activation, true);
  const bool gated = act == Activation::kSwiglu;
  const int64_t num_paths = offsets.size(0) - 1, num_rows = cell.size(0), num_cells = x.size(0), num_in = x.size(1);
  check_weight(up, up_bias, "up_PHD", x, num_paths, num_in);
  BRT_CHECK(!gated || up.size(1) % 2 == 0, "swiglu takes up of 2H rows, got ", shape_of(up));
  const int64_t hidden = up.size(1) / (gated ? 2 : 1);
  check_weight(down, down_bias, "down_PDH", x, num_paths, hidden);
  const int64_t num_out = down.size(1);
  const auto weight_R = checked_weights(weight, num_rows, x);
  const Tensor x_ND = as_contiguous(x), cell_R = as_int64(cell), row_NK = as_int64(row);
  check_range(cell_R, "cell_R", num_cells);
  check_range(row_NK, "row_NK", num_rows);
  const std::vector<int64_t> begins = rising_offsets(offsets, num_rows);
  Tensor out_ND = new_empty(x_ND, {num_cells, num_out}, x.scalar_type());
  if (num_cells == 0 || num_out == 0) return out_ND;
  const Kernels& k = kernels();

  // 2. Up: rows read from their cells, padding rows from zeros
  const int64_t element = (int64_t)x.element_size(), used = begins.back();
  const char* from = static_cast<const char*>(x_ND.const_data_ptr());
  const std::vector<char> zeros(num_in * element, 0);
  const Tensor hidden_RH = new_empty(x_ND, {used, hidden}, x.scalar_type());
  GroupedLinear g{begins, std::vector<const void*>(used), as_contiguous(up), std::nullopt, act,
                  static_cast<char*>(hidden_RH.mutable_data_ptr()), hidden * element, real_of(x)};
  const int64_t* cells = cell_R.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < used; ++r) g.rows[r] = cells[r] < 0 ? zeros.data() : from + cells[r] * num_in * element;
  if (up_bias.has_value()) g.bias_PO = as_contiguous(*up_bias);
  g.run(k);

  // 3. Down, in float32
  const Tensor rows_RD = new_empty(x_ND, {std::max<int64_t>(num_rows, 1), num_out}, ScalarType::Float);
  float* rows = rows_RD.mutable_data_ptr<float>();
  for (int64_t r = 0; r < used; ++r) g.rows[r] = g.out + r * g.out_stride;
  g.weight_POI = as_contiguous(down);
  g.bias_PO = down_bias.has_value() ? std::make_optional(as_contiguous(*down_bias)) : std::nullopt;
  g.activation = Activation::kNone;
  g.out = reinterpret_cast<char*>(rows);
  g.out_stride = num_out * (int64_t)sizeof(float);
  g.out_type = Real::kFloat32;
  std::fill(rows, rows + begins.front() * num_out, 0.0f);
  std::fill(rows + used * num_out, rows + num_rows * num_out, 0.0f);
  g.run(k);

  // 4. Weighted sum of the rows of each cell
  const int64_t num_choices = row.size(1);
  const int64_t* index = row_NK.const_data_ptr<int64_t>();
  const float* weights = weight_R ? weight_R->const_data_ptr<float>() : nullptr;
  char* out = static_cast<char*>(out_ND.mutable_data_ptr());
  torch::stable::parallel_for(0, num_cells, grain_of(num_out * 4 * (num_choices + 1)), [&](int64_t begin, int64_t end) {
    std::vector<const float*> sources(num_choices);
    std::vector<float> factors(num_choices);
    for (int64_t n = begin; n < end; ++n) {
      int64_t count = 0;
      for (int64_t i = 0; i < num_choices; ++i) {
        const int64_t r = index[n * num_choices + i];
        if (r < 0) continue;
        sources[count] = rows + r * num_out;
        factors[count++] = weights ? weights[r] : 1.0f;
      }
      k.sum_float_rows(out + n * num_out * element, sources.data(), factors.data(), count, num_out, real_of(x));
    }
  });
  return out_ND;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("expert_mlp", TORCH_BOX(&expert_mlp_cpu)); }

}  // namespace brt
