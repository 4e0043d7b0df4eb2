// grouped_conv2d: a convolution for each path, all in one parallel region: threads take pieces of any path, of a few
// rows of the result of one cell, or of several cells where images are small.
// P paths, R rows (cells) of a path, C O channels in and out, H W height and width.
#include "../grouped_conv2d.h"

#include "movement.h"
#include "simd/grouped_conv2d.h"

#include <algorithm>
#include <atomic>

namespace brt {
namespace {

constexpr int64_t kPlaces = 256;          // of the result, of one channel, that a piece makes at least where it can
constexpr int64_t kPiecesOfThread = 4;    // pieces a thread at least, so that all end together

struct Piece { int64_t path, cell, num_cells, row, num_rows; };

// What the pieces of a path have in common.
struct Prepared {
  ConvTask task;
  std::vector<Tensor> kept;  // copies in float32 that the task points to
  int64_t element, in_numel, out_numel;

  ConvTask of(const Piece& piece) const {
    ConvTask t = task;
    t.x = static_cast<const char*>(task.x) + piece.cell * in_numel * element;
    t.out = static_cast<char*>(task.out) + piece.cell * out_numel * element;
    if (t.residual) t.residual = static_cast<const char*>(task.residual) + piece.cell * out_numel * element;
    t.num_cells = piece.num_cells;
    t.first_row = piece.row;
    t.num_rows = piece.num_rows;
    return t;
  }
};

static_assert((int)ConvAct::kSilu == (int)ConvActivation::kSilu, "the inner loops have the same activations");

Prepared prepare(const PathConv& c, const Tensor& out, ConvAct act) {
  Prepared made{};
  const auto floats = [&](const std::optional<Tensor>& t) -> const float* {
    if (!t) return nullptr;
    made.kept.push_back(as_float32(*t));
    return made.kept.back().const_data_ptr<float>();
  };
  ConvTask& t = made.task;
  t.x = c.x.const_data_ptr();
  t.weight = floats(c.weight);
  t.bias = floats(c.bias);
  t.residual = c.residual ? c.residual->const_data_ptr() : nullptr;
  t.slope = floats(c.slope);
  t.out = out.mutable_data_ptr();
  t.slope_step = c.slope && c.slope->numel() > 1;
  t.channels = c.channels;
  t.height = c.height;
  t.width = c.width;
  t.out_channels = c.out_channels;
  t.out_height = c.out_height;
  t.out_width = c.out_width;
  t.kernel = c.kernel;
  t.stride = c.stride;
  t.padding = c.padding;
  t.groups = c.groups;
  t.type = real_of(c.x);
  t.activation = static_cast<ConvActivation>(act);
  made.element = (int64_t)c.x.element_size();
  made.in_numel = c.channels * c.height * c.width;
  made.out_numel = c.out_channels * c.out_height * c.out_width;
  return made;
}

// The pieces of one path; more of them, of fewer rows, where `wanted` asks for it.
void add_pieces(std::vector<Piece>& pieces, const ConvTask& t, int64_t path, int64_t num_cells, int64_t wanted,
                const Kernels& k) {
  const int64_t fit = k.conv_task_rows(t), places = t.out_height * t.out_width;
  if (fit == t.out_height && places < kPlaces && num_cells > 1) {  // whole images, several together
    const int64_t together = std::clamp<int64_t>(kPlaces / places, 1, std::max<int64_t>(num_cells / wanted, 1));
    for (int64_t n = 0; n < num_cells; n += together) {
      pieces.push_back({path, n, std::min(together, num_cells - n), 0, t.out_height});
    }
    return;
  }
  const int64_t slices = std::clamp<int64_t>(wanted / std::max<int64_t>(num_cells, 1), (t.out_height + fit - 1) / fit,
                                             t.out_height);
  const int64_t rows = (t.out_height + slices - 1) / slices;
  for (int64_t n = 0; n < num_cells; ++n) {
    for (int64_t y = 0; y < t.out_height; y += rows) {
      pieces.push_back({path, n, 1, y, std::min(rows, t.out_height - y)});
    }
  }
}

}  // namespace

std::vector<Tensor> grouped_conv2d_cpu(std::vector<Tensor> x, std::vector<Tensor> weight, std::vector<Tensor> extras,
                                       std::vector<int64_t> convs, std::string activation) {
  // 1. Shapes and values
  const ConvAct act = conv_act_of(activation);
  const std::vector<PathConv> paths = checked_convs(x, weight, extras, convs, act);
  const Kernels& k = kernels();
  std::vector<Tensor> made;
  for (const PathConv& c : paths) made.push_back(new_empty(x[0], c.out_shape(), x[0].scalar_type()));

  // 2. Pieces of all paths
  const int64_t most_threads = torch::stable::get_num_threads();
  const int64_t wanted = most_threads > 1 ? kPiecesOfThread * most_threads : 1;
  std::vector<Prepared> prepared;
  std::vector<Piece> pieces;
  int64_t scratch = 0;
  for (size_t p = 0; p < paths.size(); ++p) {
    prepared.push_back(prepare(paths[p], made[p], act));
    const size_t first = pieces.size();
    add_pieces(pieces, prepared[p].task, (int64_t)p, paths[p].num_rows, wanted, k);
    if (first < pieces.size()) {  // the first piece of a path is the largest
      scratch = std::max(scratch, k.conv_task_scratch_numel(prepared[p].of(pieces[first])));
    }
  }
  if (pieces.empty()) return made;

  // 3. Pieces, as threads become free
  const int64_t num_threads = std::clamp<int64_t>(most_threads, 1, (int64_t)pieces.size());
  scratch = (scratch + 31) / 16 * 16;
  const Tensor room = new_empty(x[0], {num_threads, scratch}, ScalarType::Float);
  float* rooms = room.mutable_data_ptr<float>();
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i = next++; i < (int64_t)pieces.size(); i = next++) {
      k.conv_task(prepared[pieces[i].path].of(pieces[i]), rooms + thread * scratch);
    }
  });
  return made;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("grouped_conv2d", TORCH_BOX(&grouped_conv2d_cpu)); }

}  // namespace brt
