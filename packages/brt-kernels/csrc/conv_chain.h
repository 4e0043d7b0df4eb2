// A conv chain as its operator describes it, checked: shared by the CPU and the CUDA library.
//
// P branches, R cells. `steps` has nine numbers a step: src, dst, add (registers; -1 = none), weight, bias, slope
// (positions in `params`; -1 = none), act (0 none, 1 ReLU, 2 PReLU), post (1: ReLU after the addition), shuffle.
#pragma once

#include "check.h"

namespace brt {

struct Image {
  int64_t channels, height, width;
  bool operator==(const Image& o) const { return channels == o.channels && height == o.height && width == o.width; }
};

struct ChainStep {
  int64_t src, dst, add, weight, bias, slope, act, post, shuffle;
  int64_t in_channels, out_channels, kernel;
  float scale;
  Image from;  // the image that is convolved
};

struct Branch {
  std::vector<ChainStep> steps;
  std::vector<Image> registers;  // channels 0: never written
};

struct Chain {
  std::vector<Branch> branches;
  Image out;
};

inline std::string text_of(const Image& i) {
  return "[" + std::to_string(i.channels) + ", " + std::to_string(i.height) + ", " + std::to_string(i.width) + "]";
}

constexpr int64_t kStepNumbers = 9;
constexpr int64_t kMaxRegisters = 64;

inline void check_vector(const Tensor& t, const char* what, int64_t step, int64_t wanted, bool or_one) {
  BRT_CHECK(t.dim() == 1 && (t.size(0) == wanted || (or_one && t.size(0) == 1)), "step ", step, ": its ", what,
            " must be [", wanted, "], got ", shape_of(t));
}

inline ChainStep checked_step(const std::vector<Tensor>& params, const int64_t* n, int64_t i, double scale,
                              std::vector<Image>& registers) {
  ChainStep s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], 0, 0, 0, static_cast<float>(scale), {}};
  const int64_t num_params = (int64_t)params.size();
  const auto known = [&](int64_t r) {
    return r >= 0 && r < (int64_t)registers.size() && registers[r].channels > 0;
  };
  // 1. Registers and parameters exist
  BRT_CHECK(known(s.src), "step ", i, " reads register ", s.src, ", which no step before it writes");
  BRT_CHECK(s.dst > 0 && s.dst < kMaxRegisters && s.dst != s.src, "step ", i, " must write a register from 1 to ",
            kMaxRegisters - 1, " other than the one it reads, got ", s.dst);
  BRT_CHECK(s.weight >= 0 && s.weight < num_params && s.bias >= -1 && s.bias < num_params && s.slope >= -1 &&
                s.slope < num_params, "step ", i, " names parameters ", s.weight, ", ", s.bias, ", ", s.slope, " of ",
            num_params);
  BRT_CHECK(s.act >= 0 && s.act <= 2 && (s.act == 2) == (s.slope >= 0), "step ", i, ": act ", s.act,
            " must be 0, 1 or 2, and 2 exactly where there is a slope");
  BRT_CHECK(s.post == 0 || s.post == 1, "step ", i, ": post must be 0 or 1, got ", s.post);
  // 2. The weight fits the image
  const Tensor& weight = params[s.weight];
  s.from = registers[s.src];
  BRT_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(2) == weight.size(3) &&
                (weight.size(2) == 1 || weight.size(2) == 3),
            "step ", i, ": its weight must be [O, I, 3, 3] or [O, I, 1, 1], got ", shape_of(weight));
  s.out_channels = weight.size(0);
  s.in_channels = weight.size(1);
  s.kernel = weight.size(2);
  BRT_CHECK(s.in_channels == s.from.channels, "step ", i, ": a weight of ", s.in_channels,
            " channels reads register ", s.src, " of ", s.from.channels);
  if (s.bias >= 0) check_vector(params[s.bias], "bias", i, s.out_channels, false);
  if (s.slope >= 0) check_vector(params[s.slope], "slope", i, s.out_channels, true);
  // 3. What it writes
  BRT_CHECK(s.shuffle >= 1 && s.shuffle <= 16 && s.out_channels % (s.shuffle * s.shuffle) == 0, "step ", i,
            ": shuffle ", s.shuffle, " does not divide ", s.out_channels, " channels");
  const Image made{s.out_channels / (s.shuffle * s.shuffle), checked_size(s.from.height, s.shuffle, 0),
                   checked_size(s.from.width, s.shuffle, 0)};
  if (s.add != -1) {
    BRT_CHECK(known(s.add) && s.shuffle == 1 && registers[s.add] == made, "step ", i, " adds register ", s.add,
              ", which must be an image ", text_of(made), " and not shuffled");
  }
  if ((int64_t)registers.size() <= s.dst) registers.resize(s.dst + 1, Image{0, 0, 0});
  BRT_CHECK(registers[s.dst].channels == 0 || registers[s.dst] == made, "step ", i, " writes ", text_of(made),
            " to register ", s.dst, " of ", text_of(registers[s.dst]));
  registers[s.dst] = made;
  return s;
}

inline Chain checked_chain(const Tensor& x, const Tensor& offsets, const std::vector<Tensor>& params,
                           const std::vector<int64_t>& steps, const std::vector<int64_t>& step_offsets,
                           const std::vector<double>& scales) {
  // 1. The lists fit each other
  BRT_CHECK(x.dim() == 4, "x_RCHW must be 4-D, got ", shape_of(x));
  check_real(x, "x_RCHW");
  check_index(offsets, "offsets_P1", 1);
  check_device(offsets, "offsets_P1", x);
  const int64_t num_branches = offsets.size(0) - 1, num_steps = (int64_t)steps.size() / kStepNumbers;
  BRT_CHECK(num_branches >= 1, "a conv chain needs at least one branch, got offsets_P1 ", shape_of(offsets));
  BRT_CHECK((int64_t)steps.size() % kStepNumbers == 0, "steps must have 9 numbers each, got ", steps.size());
  BRT_CHECK((int64_t)scales.size() == num_steps, num_steps, " steps have ", scales.size(), " scales");
  BRT_CHECK((int64_t)step_offsets.size() == num_branches + 1 && step_offsets.front() == 0 &&
                step_offsets.back() == num_steps, "step_offsets_P1 must be P + 1 = ", num_branches + 1,
            " numbers from 0 to ", num_steps, ", got ", step_offsets.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_real(params[i], "params");
    check_device(params[i], "params", x);
  }
  // 2. Each branch, register by register
  Chain chain;
  const Image in{x.size(1), x.size(2), x.size(3)};
  BRT_CHECK(in.channels > 0, "x_RCHW needs channels, got ", shape_of(x));
  for (int64_t p = 0; p < num_branches; ++p) {
    BRT_CHECK(step_offsets[p + 1] > step_offsets[p] && step_offsets[p + 1] <= num_steps, "branch ", p, " has steps ",
              step_offsets[p], " to ", step_offsets[p + 1], ": it needs at least one");
    Branch branch;
    branch.registers.push_back(in);
    for (int64_t i = step_offsets[p]; i < step_offsets[p + 1]; ++i) {
      branch.steps.push_back(checked_step(params, steps.data() + i * kStepNumbers, i, scales[i], branch.registers));
    }
    const Image out = branch.registers[branch.steps.back().dst];
    BRT_CHECK(p == 0 || out == chain.out, "branch ", p, " makes ", text_of(out), " and branch 0 ", text_of(chain.out));
    chain.out = out;
    chain.branches.push_back(std::move(branch));
  }
  return chain;
}

}  // namespace brt
