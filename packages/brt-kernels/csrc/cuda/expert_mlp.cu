// expert_mlp: gather -> up -> activation -> down -> weighted combine, in three launches: the first reads rows where the
// cells lie and applies activation and gate, the second makes the results of the paths, the third sums them.
// N cells, K choices, R rows, P paths, D H features.
#include "combine.cuh"
#include "grouped_gemm.cuh"

namespace brt {

Tensor expert_mlp_cuda(const Tensor& x, const Tensor& cell, const Tensor& row, const Tensor& offsets,
                       const std::optional<Tensor>& weight, const Tensor& up, const std::optional<Tensor>& up_bias,
                       const Tensor& down, const std::optional<Tensor>& down_bias, std::string activation) {
  // 1. Shapes
  BRT_CHECK(x.dim() == 2, "x_ND must be 2-D, got ", shape_of(x));
  check_real(x, "x_ND");
  check_index(cell, "cell_R", 1);
  check_index(row, "row_NK", 2);
  check_index(offsets, "offsets_P1", 1);
  check_device(cell, "cell_R", x);
  check_device(row, "row_NK", x);
  check_device(offsets, "offsets_P1", x);
  BRT_CHECK(offsets.size(0) >= 1 && offsets.size(0) < (1 << 30), "offsets_P1 must have at least one entry");
  BRT_CHECK(row.size(0) == x.size(0), "row_NK must have a row for each of ", x.size(0), " cells, got ", shape_of(row));
  const bool gated = activation == "swiglu";
  const Act act = gated ? Act::kNone : act_of(activation);
  const int64_t num_paths = offsets.size(0) - 1, num_rows = cell.size(0), num_cells = x.size(0), num_in = x.size(1);
  check_weight(up, up_bias, "up_PHD", x, num_paths, num_in);
  BRT_CHECK(!gated || up.size(1) % 2 == 0, "swiglu takes up of 2H rows, got ", shape_of(up));
  const int64_t hidden = up.size(1) / (gated ? 2 : 1);
  check_weight(down, down_bias, "down_PDH", x, num_paths, hidden);
  const int64_t num_out = down.size(1);
  const OnDevice device(x);
  const auto weight_R = checked_row_weights(weight, num_rows, x);
  const Tensor x_ND = as_contiguous(x), cell_R = as_int64(cell), row_NK = as_int64(row), offsets_P1 = as_int64(offsets);
  const Tensor up_PHD = as_contiguous(up), down_PDH = as_contiguous(down);
  const auto plain = [](const std::optional<Tensor>& t) {
    return t.has_value() ? std::make_optional(as_contiguous(*t)) : std::nullopt;
  };
  const std::optional<Tensor> up_bias_PH = plain(up_bias), down_bias_PD = plain(down_bias);

  // 2. Room
  Tensor out_ND = new_empty(x_ND, {num_cells, num_out}, x.scalar_type());
  if (num_cells == 0 || num_out == 0) return out_ND;
  const Tensor hidden_RH = new_empty(x_ND, {num_rows, hidden}, x.scalar_type());
  const Tensor rows_RD = new_empty(x_ND, {num_rows, num_out}, x.scalar_type());

  // 3. Three launches
  with_real(x, [&](auto zero) {
    using T = decltype(zero);
    const int paths = (int)num_paths;
    if (num_rows > 0) {
      GroupedGemm<T> g{data_of<T>(x_ND), data_of<int64_t>(cell_R), data_of<int64_t>(offsets_P1), data_of<T>(up_PHD),
                       up_bias_PH ? data_of<T>(*up_bias_PH) : nullptr, mutable_data_of<T>(hidden_RH), num_cells,
                       num_rows, num_in, hidden, paths, act, error_word(), Where::kMlpOffsets};
      if (hidden > 0 && gated) launch_grouped_gemm<T, true>(g, device.stream());
      if (hidden > 0 && !gated) launch_grouped_gemm<T, false>(g, device.stream());
      g = GroupedGemm<T>{data_of<T>(hidden_RH), nullptr, data_of<int64_t>(offsets_P1), data_of<T>(down_PDH),
                         down_bias_PD ? data_of<T>(*down_bias_PD) : nullptr, mutable_data_of<T>(rows_RD), num_rows,
                         num_rows, hidden, num_out, paths, Act::kNone};
      launch_grouped_gemm<T, false>(g, device.stream());
    }
    launch_sum_rows<T>(mutable_data_of<T>(out_ND), data_of<T>(rows_RD), data_of<int64_t>(row_NK),
                       weight_R ? data_of<float>(*weight_R) : nullptr, num_cells, num_rows, row.size(1), num_out,
                       Where::kMlpRow, device.stream());
  });
  BRT_LAUNCHED();
  return out_ND;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("expert_mlp", TORCH_BOX(&expert_mlp_cuda)); }

}  // namespace brt
