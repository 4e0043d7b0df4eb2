// route and route_mask: decisions become rows grouped by path, in cell order.
// N cells, K choices of a cell, E = N * K entries, P paths, R rows, T chunks of cells.
#include "../check.h"
#include "../route.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>

namespace brt {
namespace {

constexpr int64_t kChunkEntries = 16384;  // entries that pay for one more chunk

struct Table {
  std::vector<int64_t> path_E;  // -1: no choice, or dropped
  int64_t num_cells, num_choices, num_paths;
};

template <class T>
void read_choices(const Tensor& choice_NK, Table& table) {
  const T* from = choice_NK.const_data_ptr<T>();
  const int64_t num_paths = table.num_paths;
  std::atomic<int64_t> bad{-1};  // position of a choice that is neither a path nor none
  torch::stable::parallel_for(0, (int64_t)table.path_E.size(), kChunkEntries, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; ++e) {
      const int64_t path = from[e];
      if (path < -1 || path >= num_paths) bad.store(e, std::memory_order_relaxed);
      table.path_E[e] = path;
    }
  });
  BRT_CHECK(bad < 0, "choice_NK must be in [-1, ", num_paths, "), got ", from[bad], " at position ", bad.load());
}

// The order in which cells are served: descending priority, stable; NaN counts as the highest, as in torch.
std::vector<int64_t> served_order(const std::optional<Tensor>& priority_N, int64_t num_cells) {
  std::vector<int64_t> order(num_cells);
  std::iota(order.begin(), order.end(), 0);
  if (!priority_N) return order;
  const double* priority = priority_N->const_data_ptr<double>();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const bool nan_a = std::isnan(priority[a]), nan_b = std::isnan(priority[b]);
    return nan_a || nan_b ? nan_a && !nan_b : priority[a] > priority[b];
  });
  return order;
}

// Entries beyond the capacity of their path, counted within groups, lose their path.
void drop_overflow(Table& table, const RouteOptions& options, const std::optional<Tensor>& priority_N) {
  const int64_t group_size = options.group_size > 0 ? options.group_size : std::max<int64_t>(table.num_cells, 1);
  const int64_t num_groups = (table.num_cells + group_size - 1) / group_size;
  std::vector<int64_t> taken(checked_size(num_groups, table.num_paths, 0), 0);
  const std::vector<int64_t> order = served_order(priority_N, table.num_cells);
  for (int64_t k = 0; k < table.num_choices; ++k) {
    for (const int64_t n : order) {
      int64_t& path = table.path_E[n * table.num_choices + k];
      if (path < 0) continue;
      const int64_t limit = options.capacity->at(options.capacity->size() == 1 ? 0 : path);
      if (taken[(n / group_size) * table.num_paths + path]++ >= limit) path = -1;
    }
  }
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Routed carry_out(const Tensor& like, Table& table, const RouteOptions& options) {
  // 1. Room for every choice and for the padding
  const int64_t num_entries = (int64_t)table.path_E.size(), num_paths = table.num_paths;
  const int64_t num_rows = checked_size(num_paths, options.multiple - 1, num_entries);
  Tensor cell_R = new_empty(like, {num_rows}, ScalarType::Long);
  Tensor slot_R = new_empty(like, {num_rows}, ScalarType::Long);
  Tensor row_NK = new_empty(like, {table.num_cells, table.num_choices}, ScalarType::Long);
  Tensor offsets_P1 = new_empty(like, {num_paths + 1}, ScalarType::Long);
  int64_t* cell = cell_R.mutable_data_ptr<int64_t>();
  int64_t* slot = slot_R.mutable_data_ptr<int64_t>();
  int64_t* row = row_NK.mutable_data_ptr<int64_t>();
  int64_t* offsets = offsets_P1.mutable_data_ptr<int64_t>();

  // 2. Count the entries of each path in each chunk of entries
  const int64_t num_chunks = std::clamp<int64_t>(
      std::min<int64_t>(num_entries / kChunkEntries, torch::stable::get_num_threads()), 1, 64);
  const int64_t chunk = (num_entries + num_chunks - 1) / num_chunks;
  std::vector<int64_t> next(num_chunks * num_paths, 0);
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t* count = next.data() + t * num_paths;
      for (int64_t e = t * chunk; e < std::min(num_entries, (t + 1) * chunk); ++e) {
        if (table.path_E[e] >= 0) ++count[table.path_E[e]];
      }
    }
  });

  // 3. Where each path, and each chunk's part of it, begins; padding and the rest are no cell
  offsets[0] = 0;
  for (int64_t p = 0; p < num_paths; ++p) {
    int64_t at = offsets[p];
    for (int64_t t = 0; t < num_chunks; ++t) at += std::exchange(next[t * num_paths + p], at);
    const int64_t load = at - offsets[p];
    offsets[p + 1] = offsets[p] + (load + options.multiple - 1) / options.multiple * options.multiple;
    std::fill(cell + at, cell + offsets[p + 1], -1);
    std::fill(slot + at, slot + offsets[p + 1], -1);
  }
  std::fill(cell + offsets[num_paths], cell + num_rows, -1);
  std::fill(slot + offsets[num_paths], slot + num_rows, -1);

  // 4. Place the entries
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int64_t* place = next.data() + t * num_paths;
      const int64_t begin = t * chunk, end = std::min(num_entries, begin + chunk);
      int64_t n = begin < end ? begin / table.num_choices : 0;
      int64_t boundary = (n + 1) * table.num_choices;
      for (int64_t e = begin; e < end; ++e) {
        if (e == boundary) {
          ++n;
          boundary += table.num_choices;
        }
        const int64_t path = table.path_E[e];
        if (path < 0) {
          row[e] = -1;
          continue;
        }
        const int64_t r = place[path]++;
        row[e] = r;
        slot[r] = e;
        cell[r] = n;
      }
    }
  });
  return {cell_R, slot_R, row_NK, offsets_P1};
}

std::optional<Tensor> priority_of(const std::optional<Tensor>& priority) {
  if (!priority.has_value()) return std::nullopt;
  return as_contiguous(torch::stable::to(*priority, std::make_optional(ScalarType::Double)));
}

}  // namespace

Routed route_cpu(const Tensor& choice, int64_t num_paths, std::optional<std::vector<int64_t>> capacity,
                 const std::optional<Tensor>& priority, int64_t group_size, int64_t multiple) {
  check_index(choice, "choice_NK", 2);
  const RouteOptions options =
      checked_options(choice, num_paths, std::move(capacity), priority, group_size, multiple);
  Table table{std::vector<int64_t>(choice.numel()), choice.size(0), choice.size(1), num_paths};
  const Tensor choice_NK = as_contiguous(choice);
  if (choice.scalar_type() == ScalarType::Int) {
    read_choices<int32_t>(choice_NK, table);
  } else {
    read_choices<int64_t>(choice_NK, table);
  }
  if (options.capacity) drop_overflow(table, options, priority_of(priority));
  return carry_out(choice_NK, table, options);
}

Routed route_mask_cpu(const Tensor& mask, std::optional<std::vector<int64_t>> capacity,
                      const std::optional<Tensor>& priority, int64_t group_size, int64_t multiple) {
  check_mask(mask, "mask_NP", 2);
  const int64_t num_cells = mask.size(0), num_paths = mask.size(1);
  const RouteOptions options = checked_options(mask, num_paths, std::move(capacity), priority, group_size, multiple);
  Table table{std::vector<int64_t>(mask.numel()), num_cells, num_paths, num_paths};
  const Tensor mask_NP = as_contiguous(mask);
  const char* bytes = static_cast<const char*>(mask_NP.const_data_ptr());
  const int64_t width = (int64_t)mask.element_size();
  torch::stable::parallel_for(0, num_cells, kChunkEntries / (num_paths + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t p = 0; p < num_paths; ++p) {
        const char* entry = bytes + (n * num_paths + p) * width;
        bool set = false;
        for (int64_t b = 0; b < width; ++b) set |= entry[b] != 0;
        table.path_E[n * num_paths + p] = set ? p : -1;
      }
    }
  });
  if (options.capacity) drop_overflow(table, options, priority_of(priority));
  return carry_out(mask_NP, table, options);
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) {
  m.impl("route", TORCH_BOX(&route_cpu));
  m.impl("route_mask", TORCH_BOX(&route_mask_cpu));
}

}  // namespace brt
