// A call of grouped_conv2d as its operator describes it, checked: shared by the CPU and the CUDA library.
//
// P paths, R rows of a path, C O channels in and out, H W height and width, k kernel size. `convs` has six numbers a
// path: bias, residual, slope (positions in `extras`; -1 = none), stride, padding, groups.
#pragma once

#include "check.h"

namespace brt {

enum class ConvAct : int { kNone, kRelu, kPrelu, kSigmoid, kSilu };

inline ConvAct conv_act_of(const std::string& name) {
  if (name == "none") return ConvAct::kNone;
  if (name == "relu") return ConvAct::kRelu;
  if (name == "prelu") return ConvAct::kPrelu;
  if (name == "sigmoid") return ConvAct::kSigmoid;
  if (name == "silu") return ConvAct::kSilu;
  BRT_CHECK(false, "activation must be none, relu, prelu, sigmoid or silu, got ", name);
  return ConvAct::kNone;
}

// act(conv2d(x, weight, bias, stride, padding, groups) + residual)
struct PathConv {
  int64_t num_rows, channels, height, width, out_channels, out_height, out_width, kernel, stride, padding, groups;
  Tensor x, weight;  // contiguous
  std::optional<Tensor> bias, residual, slope;
  std::vector<int64_t> out_shape() const { return {num_rows, out_channels, out_height, out_width}; }
};

constexpr int64_t kConvNumbers = 6;

inline void check_like(const Tensor& t, const char* what, int64_t p, const Tensor& x) {
  BRT_CHECK(t.scalar_type() == x.scalar_type(), what, " of path ", p, " must be ", dtype_name(x.scalar_type()),
            " as the first x, got ", dtype_name(t.scalar_type()));
  check_device(t, what, x);
}

inline std::optional<Tensor> checked_extra(const std::vector<Tensor>& extras, int64_t at, const char* what, int64_t p,
                                           const Tensor& x) {
  BRT_CHECK(at >= -1 && at < (int64_t)extras.size(), what, " of path ", p, " is tensor ", at, " of ", extras.size());
  if (at < 0) return std::nullopt;
  check_like(extras[at], what, p, x);
  return as_contiguous(extras[at]);
}

inline PathConv checked_conv(const Tensor& x, const Tensor& weight, const std::vector<Tensor>& extras,
                             const int64_t* n, int64_t p, const Tensor& first, ConvAct act) {
  // 1. Ranks, dtypes, settings
  BRT_CHECK(x.dim() == 4, "x of path ", p, " must be [R, C, H, W], got ", shape_of(x));
  BRT_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && weight.numel() > 0, "weight of path ", p,
            " must be [O, C / groups, k, k], got ", shape_of(weight));
  check_like(x, "x", p, first);
  check_like(weight, "weight", p, first);
  PathConv c{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), 0, 0, weight.size(2), n[3], n[4], n[5],
             as_contiguous(x), as_contiguous(weight), {}, {}, {}};
  BRT_CHECK(c.stride >= 1 && c.groups >= 1 && c.padding >= 0 && c.padding < c.kernel, "path ", p,
            ": stride and groups must be positive and padding from 0 to ", c.kernel - 1, ", got ", c.stride, ", ",
            c.groups, " and ", c.padding);
  // 2. Channels and groups
  BRT_CHECK(c.channels > 0 && c.channels % c.groups == 0 && c.out_channels % c.groups == 0, "path ", p, ": ", c.groups,
            " groups do not divide ", c.channels, " channels in and ", c.out_channels, " out");
  BRT_CHECK(c.channels / c.groups == weight.size(1), "path ", p, ": weight ", shape_of(weight), " of ", c.groups,
            " groups takes ", weight.size(1), " * ", c.groups, " channels, x has ", c.channels);
  // 3. The result
  BRT_CHECK(c.height + 2 * c.padding >= c.kernel && c.width + 2 * c.padding >= c.kernel, "path ", p, ": a kernel of ",
            c.kernel, " with padding ", c.padding, " is larger than x ", shape_of(x));
  c.out_height = (c.height + 2 * c.padding - c.kernel) / c.stride + 1;
  c.out_width = (c.width + 2 * c.padding - c.kernel) / c.stride + 1;
  checked_size(checked_size(c.num_rows, c.out_channels, 0), checked_size(c.out_height, c.out_width, 0), 0);
  // 4. What is added and activated
  c.bias = checked_extra(extras, n[0], "bias", p, first);
  BRT_CHECK(!c.bias || (c.bias->dim() == 1 && c.bias->size(0) == c.out_channels), "bias of path ", p, " must be [",
            c.out_channels, "], got ", c.bias ? shape_of(*c.bias) : "");
  c.residual = checked_extra(extras, n[1], "residual", p, first);
  if (c.residual) {
    const auto sizes = c.residual->sizes();
    BRT_CHECK(std::vector<int64_t>(sizes.begin(), sizes.end()) == c.out_shape(), "residual of path ", p, " must be [",
              c.num_rows, ", ", c.out_channels, ", ", c.out_height, ", ", c.out_width, "], got ",
              shape_of(*c.residual));
  }
  if (act == ConvAct::kPrelu) {
    c.slope = checked_extra(extras, n[2], "slope", p, first);
    BRT_CHECK(c.slope && c.slope->dim() == 1 && (c.slope->size(0) == 1 || c.slope->size(0) == c.out_channels),
              "slope of path ", p, " must be [1] or [", c.out_channels, "], got ",
              c.slope ? shape_of(*c.slope) : "none");
  }
  return c;
}

inline std::vector<PathConv> checked_convs(const std::vector<Tensor>& x, const std::vector<Tensor>& weight,
                                           const std::vector<Tensor>& extras, const std::vector<int64_t>& convs,
                                           ConvAct act) {
  BRT_CHECK(!x.empty() && x.size() == weight.size() && convs.size() == kConvNumbers * x.size(),
            "expected an x, a weight and 6 numbers of each of at least one path, got ", x.size(), ", ", weight.size(),
            " and ", convs.size());
  check_real(x[0], "x of path 0");
  std::vector<PathConv> made;
  for (size_t p = 0; p < x.size(); ++p) {
    made.push_back(checked_conv(x[p], weight[p], extras, convs.data() + kConvNumbers * p, (int64_t)p, x[0], act));
  }
  return made;
}

}  // namespace brt
