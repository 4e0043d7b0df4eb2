// Rows of each path times its weight, with the sizes of the paths read on the device: what grouped_linear and
// expert_mlp are made of.
//
// R rows, P paths, I features in (summed over), O features out.
#pragma once

#include "device_error.cuh"

namespace brt {

enum class Act : int { kNone, kRelu, kGelu, kGeluTanh, kSilu };

template <class T>
struct GroupedGemm {
  const T* x;              // [X, I]
  const int64_t* cell_R;   // row of x for each row, or null: the same; outside [0, X) a row of zeros
  const int64_t* offsets;  // [P + 1]
  const T* weight;         // [P, O, I]; gated [P, 2 O, I], gate first
  const T* bias;           // [P, O] (gated 2 O), or null
  T* out;                  // [R, O]
  int64_t num_x, num_rows, num_in, num_out;
  int num_paths;
  Act act;
  ErrorWord* errors = nullptr;  // null: indices were checked before
  Where offsets_at = Where::kLinearOffsets;
};

// Makes every row of out: those of the paths, and zeros past the last offset. kGated: silu(gate) times its partner.
template <class T, bool kGated>
void launch_grouped_gemm(const GroupedGemm<T>& g, cudaStream_t stream);

inline Act act_of(const std::string& name) {
  if (name == "none") return Act::kNone;
  if (name == "relu") return Act::kRelu;
  if (name == "gelu") return Act::kGelu;
  if (name == "gelu_tanh") return Act::kGeluTanh;
  if (name == "silu") return Act::kSilu;
  BRT_CHECK(false, "activation must be none, relu, gelu, gelu_tanh or silu, got ", name);
  return Act::kNone;
}

}  // namespace brt
