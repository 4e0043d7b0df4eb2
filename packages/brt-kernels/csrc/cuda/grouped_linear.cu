// grouped_linear: rows of path p times weight[p].T plus bias[p], activated.
// R rows, P paths, I features in, O features out.
#include "grouped_gemm.cuh"

namespace brt {

Tensor grouped_linear_cuda(const Tensor& x, const Tensor& offsets, const Tensor& weight,
                           const std::optional<Tensor>& bias, std::string activation) {
  BRT_CHECK(x.dim() == 2, "x_RI must be 2-D, got ", shape_of(x));
  check_real(x, "x_RI");
  check_index(offsets, "offsets_P1", 1);
  check_device(offsets, "offsets_P1", x);
  BRT_CHECK(offsets.size(0) >= 1 && offsets.size(0) < (1 << 30), "offsets_P1 must have at least one entry");
  const Act act = act_of(activation);
  check_weight(weight, bias, "weight_POI", x, offsets.size(0) - 1, x.size(1));
  const OnDevice device(x);
  const int64_t num_rows = x.size(0), num_out = weight.size(1);
  const Tensor x_RI = as_contiguous(x), offsets_P1 = as_int64(offsets), weight_POI = as_contiguous(weight);
  const std::optional<Tensor> bias_PO = bias.has_value() ? std::make_optional(as_contiguous(*bias)) : std::nullopt;
  Tensor out_RO = new_empty(x_RI, {num_rows, num_out}, x.scalar_type());
  if (num_rows == 0 || num_out == 0) return out_RO;
  with_real(x, [&](auto zero) {
    using T = decltype(zero);
    const GroupedGemm<T> g{data_of<T>(x_RI), nullptr, data_of<int64_t>(offsets_P1), data_of<T>(weight_POI),
                           bias_PO ? data_of<T>(*bias_PO) : nullptr, mutable_data_of<T>(out_RO), num_rows, num_rows,
                           x.size(1), num_out, (int)offsets.size(0) - 1, act, error_word()};
    launch_grouped_gemm<T, false>(g, device.stream());
  });
  return out_RO;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear_cuda)); }

}  // namespace brt
