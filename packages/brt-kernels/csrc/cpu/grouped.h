// Products of packed rows with the weights of their paths: what grouped_linear and expert_mlp share.
#pragma once

#include "movement.h"
#include "simd/grouped_linear.h"

namespace brt {

// One linear layer a path over rows that lie path by path.
struct GroupedLinear {
  std::vector<int64_t> begins;     // P + 1
  std::vector<const void*> rows;   // where each row is read
  Tensor weight_POI;               // contiguous
  std::optional<Tensor> bias_PO;   // contiguous
  Activation activation;
  char* out;                       // row r at out + r * out_stride
  int64_t out_stride;              // bytes
  Real out_type;

  void run(const Kernels& k) const;
};

Activation activation_of(const std::string& name, bool allow_swiglu);
std::vector<int64_t> rising_offsets(const Tensor& offsets, int64_t num_rows);

}  // namespace brt
