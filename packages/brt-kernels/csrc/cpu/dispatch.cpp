// dispatch: rows[r] = weight[r] * x[cell[r]], zero where cell[r] < 0.
// N cells, S trailing cell sizes, R rows, K choices.
#include "movement.h"

namespace brt {
namespace {

struct Move {
  const char* x;
  char* rows;
  const int64_t* cell_R;
  const int64_t* row_NK;
  const float* weight_R;  // or null
  int64_t num_cells, num_rows, num_choices, numel, row_bytes;
  Real type;
  bool stream;
};

void move_row(const Move& m, const Kernels& k, int64_t row, int64_t cell) {
  char* dst = m.rows + row * m.row_bytes;
  const char* src = m.x + cell * m.row_bytes;
  if (m.weight_R) {
    k.scale_row(dst, src, m.weight_R[row], m.numel, m.type, m.stream);
  } else {
    k.copy_row(dst, src, m.row_bytes, m.stream);
  }
}

// Each cell read once and written to all its rows. Needs row_NK and cell_R to be each other's inverse.
void by_cell(const Move& m, const Kernels& k) {
  torch::stable::parallel_for(0, m.num_cells, grain_of(m.row_bytes * m.num_choices), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t i = 0; i < m.num_choices; ++i) {
        const int64_t row = m.row_NK[n * m.num_choices + i];
        if (row >= 0) move_row(m, k, row, n);
      }
    }
    k.fence();
  });
}

// Rows in order; `only_empty` writes just the zeros.
void by_row(const Move& m, const Kernels& k, bool only_empty) {
  torch::stable::parallel_for(0, m.num_rows, grain_of(m.row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (m.cell_R[r] < 0) {
        k.zero_row(m.rows + r * m.row_bytes, m.row_bytes, m.stream);
      } else if (!only_empty) {
        move_row(m, k, r, m.cell_R[r]);
      }
    }
    k.fence();
  });
}

// Whether every routed row is named once, by its own cell.
bool inverse(const Move& m) {
  int64_t num_named = 0, num_routed = 0;
  for (int64_t n = 0; n < m.num_cells; ++n) {
    for (int64_t i = 0; i < m.num_choices; ++i) {
      const int64_t row = m.row_NK[n * m.num_choices + i];
      if (row < 0) continue;
      if (row >= m.num_rows || m.cell_R[row] != n) return false;
      for (int64_t j = 0; j < i; ++j) {
        if (m.row_NK[n * m.num_choices + j] == row) return false;
      }
      ++num_named;
    }
  }
  for (int64_t r = 0; r < m.num_rows; ++r) num_routed += m.cell_R[r] >= 0;
  return num_named == num_routed;
}

}  // namespace

Tensor dispatch_cpu(const Tensor& x, const Tensor& cell, const Tensor& row, const std::optional<Tensor>& weight) {
  // 1. Shapes and values
  BRT_CHECK(x.dim() >= 1, "x_NS must have at least 1 dimension, got a scalar");
  if (weight.has_value()) check_real(x, "x_NS");
  BRT_CHECK(is_movable(x.scalar_type()), "x_NS must be floats, integers or bool, got ", dtype_name(x.scalar_type()));
  check_index(cell, "cell_R", 1);
  check_index(row, "row_NK", 2);
  check_device(cell, "cell_R", x);
  check_device(row, "row_NK", x);
  BRT_CHECK(row.size(0) == x.size(0), "row_NK must have a row for each of ", x.size(0), " cells, got ", shape_of(row));
  const int64_t num_rows = cell.size(0);
  const auto weight_R = checked_weights(weight, num_rows, x);
  const Tensor x_NS = as_contiguous(x), cell_R = as_int64(cell), row_NK = as_int64(row);
  check_range(cell_R, "cell_R", x.size(0));

  // 2. Room
  Tensor rows_RS = new_empty(x_NS, with_rows(x_NS, num_rows), x.scalar_type());
  Move m{};
  m.numel = row_numel(x_NS);
  m.row_bytes = m.numel * (int64_t)x.element_size();
  if (num_rows == 0 || m.numel == 0) return rows_RS;
  m.x = static_cast<const char*>(x_NS.const_data_ptr());
  m.rows = static_cast<char*>(rows_RS.mutable_data_ptr());
  m.cell_R = cell_R.const_data_ptr<int64_t>();
  m.row_NK = row_NK.const_data_ptr<int64_t>();
  m.weight_R = weight_R ? weight_R->const_data_ptr<float>() : nullptr;
  m.num_cells = x.size(0);
  m.num_rows = num_rows;
  m.num_choices = row.size(1);
  m.type = real_of(x);
  m.stream = num_rows * m.row_bytes > kStreamBytes;

  // 3. Move
  constexpr int64_t kFewChoices = 8;  // with more of them (a mask), following row_NK costs more than it saves
  const Kernels& k = kernels();
  if (m.num_choices <= kFewChoices && inverse(m)) {
    by_cell(m, k);
    by_row(m, k, true);
  } else {
    by_row(m, k, false);
  }
  return rows_RS;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("dispatch", TORCH_BOX(&dispatch_cpu)); }

}  // namespace brt
