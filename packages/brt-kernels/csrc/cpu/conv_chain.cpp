// conv_chain: a small convolutional branch for each cell, the branches of a region in one call. One thread takes
// one cell through all its steps, so images stay in its cache.
#include "../conv_chain.h"

#include "grouped.h"
#include "simd/conv_chain.h"

#include <algorithm>
#include <atomic>

namespace brt {
namespace {

// Where things lie for the branches of one call: floats from the start of a thread's room, or of the packed weights.
struct Layout {
  std::vector<std::vector<int64_t>> planes;  // of each register of each branch
  std::vector<std::vector<int64_t>> packed;  // of each step of each branch
  int64_t scratch = 0, room = 0, packed_numel = 0;
};

int64_t aligned(int64_t numel) { return (numel + 15) / 16 * 16; }

ConvStep shape_of_step(const ChainStep& s) {
  ConvStep step{};
  step.in_channels = s.in_channels;
  step.out_channels = s.out_channels;
  step.height = s.from.height;
  step.width = s.from.width;
  step.kernel = s.kernel;
  step.shuffle = s.shuffle;
  return step;
}

Layout layout_of(const Chain& chain, const Kernels& k) {
  Layout layout;
  int64_t planes_end = 0, scratch = aligned(std::max(chain.out.width, chain.branches[0].registers[0].width) + 128);
  for (const Branch& branch : chain.branches) {
    int64_t at = 0;
    layout.planes.emplace_back();
    for (const Image& image : branch.registers) {
      layout.planes.back().push_back(at);
      if (image.channels > 0) at += aligned(k.plane_numel(image.channels, image.height, image.width));
    }
    planes_end = std::max(planes_end, at);
    layout.packed.emplace_back();
    for (const ChainStep& s : branch.steps) {
      layout.packed.back().push_back(layout.packed_numel);
      layout.packed_numel += aligned(k.conv_packed_numel(s.out_channels, s.in_channels, s.kernel));
      scratch = std::max(scratch, aligned(k.conv_scratch_numel(shape_of_step(s))));
    }
  }
  layout.scratch = planes_end;
  layout.room = checked_size(1, planes_end, scratch);
  return layout;
}

void pack(const Chain& chain, const Layout& layout, const std::vector<Tensor>& params, float* packed,
          const Kernels& k) {
  struct Job { const ChainStep* step; int64_t at; };
  std::vector<Job> jobs;
  for (size_t p = 0; p < chain.branches.size(); ++p) {
    for (size_t i = 0; i < chain.branches[p].steps.size(); ++i) {
      jobs.push_back({&chain.branches[p].steps[i], layout.packed[p][i]});
    }
  }
  std::vector<const float*> data(params.size());
  for (size_t i = 0; i < params.size(); ++i) data[i] = params[i].const_data_ptr<float>();
  torch::stable::parallel_for(0, (int64_t)jobs.size(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const ChainStep& s = *jobs[i].step;
      k.conv_pack(packed + jobs[i].at, data[s.weight], s.out_channels, s.in_channels, s.kernel);
    }
  });
}

// One cell of one branch, all steps.
struct Runner {
  const Kernels& k;
  const Chain& chain;
  const Layout& layout;
  const std::vector<const float*>& params;
  const std::vector<std::vector<std::vector<float>>>& slopes;  // one value a channel, of each step of each branch
  const float* packed;

  void run(int64_t p, const float* in, float* out, float* room) const {
    const Branch& branch = chain.branches[p];
    const std::vector<int64_t>& planes = layout.planes[p];
    float* scratch = room + layout.scratch;
    const Image& first = branch.registers[0];
    k.plane_read(room + planes[0], in, first.channels, first.height, first.width, scratch);
    for (size_t i = 0; i < branch.steps.size(); ++i) {
      const ChainStep& s = branch.steps[i];
      ConvStep step = shape_of_step(s);
      step.src = room + planes[s.src];
      step.dst = room + planes[s.dst];
      step.add = s.add >= 0 ? room + planes[s.add] : nullptr;
      step.packed = packed + layout.packed[p][i];
      step.bias = s.bias >= 0 ? params[s.bias] : nullptr;
      step.slope = slopes[p][i].empty() ? nullptr : slopes[p][i].data();
      step.scale = s.scale;
      step.relu = s.act == 1;
      step.post_relu = s.post == 1;
      k.conv_step(step, scratch);
    }
    const Image& last = chain.out;
    k.plane_write(out, room + planes[branch.steps.back().dst], last.channels, last.height, last.width, scratch);
  }
};

std::vector<Tensor> all_float32(const std::vector<Tensor>& params) {
  std::vector<Tensor> made;
  for (const Tensor& t : params) made.push_back(as_float32(t));
  return made;
}

// A slope of one value becomes one of every channel.
std::vector<std::vector<std::vector<float>>> spread_slopes(const Chain& chain, const std::vector<Tensor>& params) {
  std::vector<std::vector<std::vector<float>>> slopes;
  for (const Branch& branch : chain.branches) {
    slopes.emplace_back();
    for (const ChainStep& s : branch.steps) {
      slopes.back().emplace_back();
      if (s.slope < 0) continue;
      const float* from = params[s.slope].const_data_ptr<float>();
      const bool one = params[s.slope].numel() == 1;
      for (int64_t o = 0; o < s.out_channels; ++o) slopes.back().back().push_back(from[one ? 0 : o]);
    }
  }
  return slopes;
}

}  // namespace

Tensor conv_chain_pack_cpu(const Tensor& x, const Tensor& offsets, std::vector<Tensor> params,
                           std::vector<int64_t> steps, std::vector<int64_t> step_offsets, std::vector<double> scales) {
  const Chain chain = checked_chain(x, offsets, params, steps, step_offsets, scales);
  const Layout layout = layout_of(chain, kernels());
  Tensor packed = new_empty(x, {layout.packed_numel}, ScalarType::Float);
  pack(chain, layout, all_float32(params), packed.mutable_data_ptr<float>(), kernels());
  return packed;
}

Tensor conv_chain_cpu(const Tensor& x, const Tensor& offsets, std::vector<Tensor> params, std::vector<int64_t> steps,
                      std::vector<int64_t> step_offsets, std::vector<double> scales, std::optional<Tensor> packed) {
  // 1. Shapes and values
  const Chain chain = checked_chain(x, offsets, params, steps, step_offsets, scales);
  const int64_t num_rows = x.size(0);
  const std::vector<int64_t> begins = rising_offsets(offsets, num_rows);
  const Kernels& k = kernels();
  const Layout layout = layout_of(chain, k);
  const Image& out = chain.out;
  const Tensor x_RCHW = as_float32(x);
  Tensor out_RCHW = new_empty(x_RCHW, {num_rows, out.channels, out.height, out.width}, ScalarType::Float);
  if (out_RCHW.numel() == 0) return torch::stable::to(out_RCHW, std::make_optional(x.scalar_type()));

  // 2. Weights, transformed
  const std::vector<Tensor> floats = all_float32(params);
  if (packed.has_value()) {
    BRT_CHECK(packed->scalar_type() == ScalarType::Float && packed->is_cpu() && packed->is_contiguous() &&
                  packed->dim() == 1 && packed->size(0) == layout.packed_numel,
              "packed must be what conv_chain_pack made of the same chain: float32 [", layout.packed_numel, "], got ",
              dtype_name(packed->scalar_type()), shape_of(*packed));
  } else {
    packed = new_empty(x_RCHW, {layout.packed_numel}, ScalarType::Float);
    pack(chain, layout, floats, packed->mutable_data_ptr<float>(), k);
  }
  std::vector<const float*> data;
  for (const Tensor& t : floats) data.push_back(t.const_data_ptr<float>());
  const auto slopes = spread_slopes(chain, floats);
  const Runner runner{k, chain, layout, data, slopes, packed->const_data_ptr<float>()};

  // 3. Cells, one after the other as threads become free
  const int64_t num_threads = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(num_rows, 1));
  const Tensor room = new_empty(x_RCHW, {num_threads, layout.room + 16}, ScalarType::Float);
  float* rooms = room.mutable_data_ptr<float>();
  const float* in = x_RCHW.const_data_ptr<float>();
  float* to = out_RCHW.mutable_data_ptr<float>();
  const int64_t in_numel = row_numel(x_RCHW), out_numel = row_numel(out_RCHW);
  std::fill(to, to + begins.front() * out_numel, 0.0f);
  std::fill(to + begins.back() * out_numel, to + num_rows * out_numel, 0.0f);
  std::atomic<int64_t> next{begins.front()};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t first, int64_t) {
    float* mine = rooms + first * (layout.room + 16);
    int64_t branch = -1;
    for (int64_t r = next++; r < begins.back(); r = next++) {
      const int64_t p = std::upper_bound(begins.begin(), begins.end(), r) - begins.begin() - 1;
      if (p != branch) std::fill(mine, mine + layout.scratch, 0.0f);  // the zeros around the planes of this branch
      branch = p;
      runner.run(p, in + r * in_numel, to + r * out_numel, mine);
    }
  });
  return x.scalar_type() == ScalarType::Float ? out_RCHW
                                              : torch::stable::to(out_RCHW, std::make_optional(x.scalar_type()));
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) {
  m.impl("conv_chain_pack", TORCH_BOX(&conv_chain_pack_cpu));
  m.impl("conv_chain", TORCH_BOX(&conv_chain_cpu));
}

}  // namespace brt
