// A block of rows of one path times a block of its weight's rows.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace brt {

// out[r, o] = act(<x[r], weight[o]> + bias[o]) for num_rows rows and num_out features. Swiglu: silu of that, times
// the same of weight[o + up] and bias[o + up].
struct GroupTask {
  const void* const* x_rows;  // num_rows pointers to num_in elements
  const void* weight;         // [num_out, num_in]
  const void* bias;           // [num_out], or null
  void* const* out_rows;      // num_rows pointers to where feature 0 of this task goes
  int64_t num_rows, num_in, num_out;
  int64_t up;                 // rows of the weight from the gate to its partner (swiglu)
  Real type;                  // of x, weight and bias
  Real out_type;              // `type`, or kFloat32
  Activation activation;
};

#ifdef BRT_ISA
namespace BRT_ISA {

int64_t group_scratch_bytes(const GroupTask& task);  // of its sizes only
void group_task(const GroupTask& task, void* scratch);

}  // namespace BRT_ISA
#endif

}  // namespace brt
