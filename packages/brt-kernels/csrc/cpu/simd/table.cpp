// The table of this instruction set.
#include "conv_chain.h"
#include "grouped_conv2d.h"
#include "grouped_linear.h"
#include "outer.h"
#include "rows.h"

#define BRT_TEXT_(x) #x
#define BRT_TEXT(x) BRT_TEXT_(x)

namespace brt::BRT_ISA {

const Kernels* kernels() {
  static const Kernels table = {
      .name = BRT_TEXT(BRT_ISA),
      .copy_row = copy_row,
      .zero_row = zero_row,
      .scale_row = scale_row,
      .sum_rows = sum_rows,
      .sum_float_rows = sum_float_rows,
      .dot_row = dot_row,
      .fence = fence,
      .group_scratch_bytes = group_scratch_bytes,
      .group_task = group_task,
      .outer_scratch_numel = outer_scratch_numel,
      .outer_task = outer_task,
      .conv_packed_numel = conv_packed_numel,
      .conv_pack = conv_pack,
      .plane_numel = plane_numel,
      .conv_scratch_numel = conv_scratch_numel,
      .plane_read = plane_read,
      .plane_write = plane_write,
      .conv_step = conv_step,
      .conv_task_rows = conv_task_rows,
      .conv_task_scratch_numel = conv_task_scratch_numel,
      .conv_task = conv_task,
  };
  return &table;
}

}  // namespace brt::BRT_ISA
