// One piece of a convolution: some rows of the result of one cell, or the whole results of some cells.
#pragma once

#include "kernels.h"

namespace brt {

enum class ConvActivation : int { kNone, kRelu, kPrelu, kSigmoid, kSilu };

// out = act(conv2d(x, weight) + bias + residual)
struct ConvTask {
  const void* x;         // [cells, C, H, W]
  const float* weight;   // [O, C / groups, k, k]
  const float* bias;     // [O], or null
  const void* residual;  // as out, or null
  const float* slope;    // PReLU
  void* out;             // [cells, O, out_height, out_width]
  int64_t slope_step;    // 0: one slope for all channels
  int64_t channels, height, width, out_channels, out_height, out_width, kernel, stride, padding, groups;
  int64_t num_cells, first_row, num_rows;  // of the result
  Real type;                               // of x, residual and out
  ConvActivation activation;
};

#ifdef BRT_ISA
namespace BRT_ISA {

int64_t conv_task_rows(const ConvTask& task);
int64_t conv_task_scratch_numel(const ConvTask& task);
void conv_task(const ConvTask& task, float* scratch);

}  // namespace BRT_ISA
#endif

}  // namespace brt
