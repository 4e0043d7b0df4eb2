// c = a @ b where the columns of b lie side by side: gradients of a grouped linear layer.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace brt {

struct OuterTask {
  const void* a;  // element (m, k) at m * a_row + k * a_column
  const void* b;  // element (k, n) at k * b_row + n
  void* c;        // element (m, n) at m * c_row + n
  int64_t a_row, a_column, b_row, c_row;
  int64_t num_rows, num_sums, num_columns;  // m, k, n
  Real type;
};

#ifdef BRT_ISA
namespace BRT_ISA {

int64_t outer_scratch_numel(int64_t num_rows, int64_t num_sums);  // floats
void outer_task(const OuterTask& task, float* scratch);

}  // namespace BRT_ISA
#endif

}  // namespace brt
