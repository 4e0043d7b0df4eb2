// grouped_outer: out[p] = y_p.T @ x_p over the rows of path p, the gradient of a grouped linear layer's weight.
// R rows, P paths, I O features.
#include "grouped.h"
#include "outer.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace brt {
namespace {

constexpr int64_t kReturnedBytes = int64_t{64} << 10;  // zeros of more than this are pages given back

// Writes zeros to memory that new_empty gave.
//
// NOTES: Where few of many paths have rows, writing the gradients of the others, all zero, is the whole time of a
// training step. Private memory that is given back to the system reads as zeros, and costs nothing until it is read.
void write_zeros(char* to, int64_t num_bytes) {
#ifdef MADV_DONTNEED
  if (num_bytes >= kReturnedBytes) {
    static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(to);
    const uintptr_t begin = (first + page - 1) / page * page, end = (first + num_bytes) / page * page;
    // Refused where pages are locked: then they are written
    if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED) == 0) {
      std::memset(to, 0, begin - first);
      std::memset(reinterpret_cast<void*>(end), 0, first + num_bytes - end);
      return;
    }
  }
#endif
  std::memset(to, 0, num_bytes);
}

constexpr int64_t kColumns = 256, kRows = 512;  // of the result of one part

std::vector<OuterTask> cut(const std::vector<OuterTask>& products) {
  std::vector<OuterTask> parts;
  for (const OuterTask& whole : products) {
    const int64_t element = whole.type == Real::kFloat32 ? 4 : 2;
    for (int64_t m = 0; m < whole.num_rows; m += kRows) {
      for (int64_t n = 0; n < whole.num_columns; n += kColumns) {
        OuterTask part = whole;
        part.a = static_cast<const char*>(whole.a) + m * whole.a_row * element;
        part.b = static_cast<const char*>(whole.b) + n * element;
        part.c = static_cast<char*>(whole.c) + (m * whole.c_row + n) * element;
        part.num_rows = std::min(kRows, whole.num_rows - m);
        part.num_columns = std::min(kColumns, whole.num_columns - n);
        parts.push_back(part);
      }
    }
  }
  return parts;
}

}  // namespace

void run_products(const std::vector<OuterTask>& products, const Tensor& like, const Kernels& k) {
  const std::vector<OuterTask> parts = cut(products);
  if (parts.empty()) return;
  int64_t scratch = 0;
  for (const OuterTask& part : parts) scratch = std::max(scratch, k.outer_scratch_numel(part.num_rows, part.num_sums));
  scratch = (scratch + 31) / 16 * 16;
  const int64_t num_threads = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, (int64_t)parts.size());
  const Tensor room = new_empty(like, {num_threads, scratch}, ScalarType::Float);
  float* rooms = room.mutable_data_ptr<float>();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i = next++; i < (int64_t)parts.size(); i = next++) k.outer_task(parts[i], rooms + thread * scratch);
  });
}

Tensor grouped_outer_cpu(const Tensor& y, const Tensor& x, const Tensor& offsets) {
  // 1. Shapes and values
  BRT_CHECK(y.dim() == 2 && x.dim() == 2 && y.size(0) == x.size(0), "y_RO and x_RI must be 2-D with equal rows, got ",
            shape_of(y), " and ", shape_of(x));
  check_real(x, "x_RI");
  BRT_CHECK(y.scalar_type() == x.scalar_type(), "y_RO must be ", dtype_name(x.scalar_type()), " as x, got ",
            dtype_name(y.scalar_type()));
  check_index(offsets, "offsets_P1", 1);
  check_device(y, "y_RO", x);
  check_device(offsets, "offsets_P1", x);
  BRT_CHECK(offsets.size(0) >= 1, "offsets_P1 must have at least one entry");
  const std::vector<int64_t> begins = rising_offsets(offsets, x.size(0));
  const int64_t num_paths = offsets.size(0) - 1, num_out = y.size(1), num_in = x.size(1);
  const Tensor y_RO = as_contiguous(y), x_RI = as_contiguous(x);
  Tensor out_POI = new_empty(x_RI, {num_paths, num_out, num_in}, x.scalar_type());
  if (out_POI.numel() == 0) return out_POI;

  // 2. One product a path; zeros where paths, often many in turn, have no rows
  const int64_t element = (int64_t)x.element_size();
  const char* ys = static_cast<const char*>(y_RO.const_data_ptr());
  const char* xs = static_cast<const char*>(x_RI.const_data_ptr());
  char* out = static_cast<char*>(out_POI.mutable_data_ptr());
  std::vector<OuterTask> products;
  for (int64_t p = 0, used = 0; p < num_paths; p = used + 1) {
    for (used = p; used < num_paths && begins[used] == begins[used + 1];) ++used;
    write_zeros(out + p * num_out * num_in * element, (used - p) * num_out * num_in * element);
    if (used == num_paths) break;
    products.push_back({ys + begins[used] * num_out * element, xs + begins[used] * num_in * element,
                        out + used * num_out * num_in * element, 1, num_out, num_in, num_in, num_out,
                        begins[used + 1] - begins[used], num_in, real_of(x)});
  }
  run_products(products, x_RI, kernels());
  return out_POI;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("grouped_outer", TORCH_BOX(&grouped_outer_cpu)); }

}  // namespace brt
