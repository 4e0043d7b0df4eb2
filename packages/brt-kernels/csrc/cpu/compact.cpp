// compact: the indices of the cells that are kept, in order, then -1; and how many they are. N cells.
#include "../route.h"

#include <algorithm>

namespace brt {

std::tuple<Tensor, Tensor> compact_cpu(const Tensor& keep) {
  check_mask(keep, "keep_N", 1);
  const Tensor keep_N = as_contiguous(keep);
  const int64_t num_cells = keep.size(0), width = (int64_t)keep.element_size();
  Tensor index_N = new_empty(keep_N, {num_cells}, ScalarType::Long);
  Tensor count_1 = new_empty(keep_N, {1}, ScalarType::Long);
  const char* bytes = static_cast<const char*>(keep_N.const_data_ptr());
  int64_t* index = index_N.mutable_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t n = 0; n < num_cells; ++n) {
    bool kept = false;
    for (int64_t b = 0; b < width; ++b) kept |= bytes[n * width + b] != 0;
    index[count] = n;  // count <= n < num_cells
    count += kept;
  }
  std::fill(index + count, index + num_cells, -1);
  count_1.mutable_data_ptr<int64_t>()[0] = count;
  return {index_N, count_1};
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("compact", TORCH_BOX(&compact_cpu)); }

}  // namespace brt
