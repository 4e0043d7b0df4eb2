// Where the images and weights of a conv chain lie on the device: planned on the host from shapes alone, so that the
// packing and every call come to the same plan and neither reads anything back.
//
// An image [C, H, W] is kept as U planes of 16-byte units: unit (u, y, x) holds kUnit channels (4 floats, 8 halves) of
// one pixel, with a border of zeros one pixel wide. The channels that fill up the last plane are zeros.
//
// The weights of a branch are a row of *pieces*, each read in one go: what makes up to three times eight output
// channels of one step. A piece begins with what the kernel has to know about its step, so that a cell's block needs
// no other program.
#pragma once

#include "../conv_chain.h"
#include "common.cuh"

#include <algorithm>

namespace brt {

enum class Space : int { kShared, kScratch, kResult, kNowhere };

struct Place {
  Space space;
  int at;  // bytes
};

constexpr int kUnitBytes = 16;
constexpr int kTileChannels = 8;  // output channels of a matrix product
constexpr int kTileRows = 4;      // rows of an image, of kTilePixels pixels, that a warp makes at a time
constexpr int kTilePixels = 16;
constexpr int kMostWarps = 16;
constexpr int kPieceBytes = 32 << 10;  // wide convolutions take smaller pieces rather than larger ones
constexpr int64_t kMostInChannels = 256;

template <class T>
constexpr int kUnit = kUnitBytes / (int)sizeof(T);
// Tiles of a piece: as many as leave a thread its 128 registers. Floats need three products for one, and more of them.
inline int most_tiles(int element_bytes) { return element_bytes == 4 ? 2 : 3; }

struct alignas(16) Piece {
  int next_bytes;  // of the piece after this one in the branch, 0 = last
  int kernel;      // 3 or 1
  int tiles;       // this piece makes channels first_channel to first_channel + 8 * tiles
  int first_channel;
  int out_channels;
  int height, width;  // of the image that is convolved
  int num_taps;       // units that an output pixel reads in one row: planes times columns of the kernel
  Place src, add, dst;
  int dst_units, dst_channels;
  int shuffle, act, post;
  int clear;  // before dst is written: 1 = zeros for its border, 2 = for all of it
  float scale;
  int finish;  // one of the two ways that are usual in a residual block, or 0
  int tiles_along, num_tiles;  // of pixels: a warp's piece of the image
};
constexpr int kFinishRelu = 1, kFinishAdd = 2;
static_assert(sizeof(Piece) % 16 == 0, "what follows it is read 16 bytes at a time");

// After a Piece: where each tap lies, in units; bias and slope; weights as a warp's lanes take them, 8 bytes each.
__host__ __device__ inline int num_pairs(const Piece& p) { return (p.num_taps + 1) / 2; }
__host__ __device__ inline int taps_at(const Piece&) { return (int)sizeof(Piece); }
__host__ __device__ inline int bias_at(const Piece& p) { return taps_at(p) + (2 * num_pairs(p) + 3) / 4 * 16; }
__host__ __device__ inline int slope_at(const Piece& p) { return bias_at(p) + p.tiles * kTileChannels * 4; }
__host__ __device__ inline int weights_at(const Piece& p) { return slope_at(p) + p.tiles * kTileChannels * 4; }
__host__ __device__ inline int num_weight_pairs(const Piece& p) { return num_pairs(p) * p.kernel * p.tiles * 32; }
__host__ __device__ inline int piece_bytes(const Piece& p) { return weights_at(p) + num_weight_pairs(p) * 8; }

// What the packed weights begin with, one a branch.
struct alignas(16) Entry {
  int first_at, first_bytes;  // the first piece
  Place cell;
};

// A piece to be made, and of what. Types: 0 float32, 1 float16, 2 bfloat16.
struct alignas(16) PieceJob {
  Piece piece;
  const void *weight, *bias, *slope;  // bias and slope may be null
  int64_t to;
  int weight_type, bias_type, slope_type;
  int in_channels, slope_step;  // slope_step 0: one slope for all channels
  int unused;
};

struct ChainPlan {
  std::vector<Entry> entries;
  std::vector<PieceJob> jobs;
  int64_t packed_bytes = 0, most_piece_bytes = 0, shared_bytes = 0, scratch_bytes = 0, num_warps = 1;
};

inline int64_t num_units(int64_t channels, int element_bytes) {
  const int64_t unit = kUnitBytes / element_bytes;
  return (channels + unit - 1) / unit;
}

inline int64_t image_bytes(const Image& image, int element_bytes) {
  return checked_size(checked_size(image.height + 2, image.width + 2, 0),
                      num_units(image.channels, element_bytes) * kUnitBytes, 0);
}

// What a register holds from one writing of it to the last reading.
struct Value {
  Image image;
  int64_t begin, end, reads, bytes;
  Place place;
};

struct StepPlaces {
  Place src, add, dst;
  int clear;
};

// Places for the images of one branch: in shared memory those that are read most for the time that they are there.
class BranchPlaces {
 public:
  BranchPlaces(const Branch& branch, int element_bytes, int64_t shared_room)
      : element_bytes_(element_bytes), shared_room_(shared_room) {
    find_values(branch);
    place_values();
    find_clears(branch);
  }

  Place cell() const { return values_[0].place; }
  const StepPlaces& step(size_t i) const { return steps_[i]; }
  int64_t shared_end() const { return ends_[0]; }
  int64_t scratch_end() const { return ends_[1]; }

 private:
  struct Use { int src, add, dst; };  // values, -1 = none

  void find_values(const Branch& branch) {
    std::vector<int> now(branch.registers.size(), -1);
    const auto write = [&](int64_t reg, int64_t step) {
      const Image& image = branch.registers[reg];
      now[reg] = (int)values_.size();
      values_.push_back({image, step, step, 0, image_bytes(image, element_bytes_), {Space::kNowhere, 0}});
    };
    const auto read = [&](int64_t reg, int64_t step) {
      if (reg < 0) return -1;
      Value& value = values_[now[reg]];
      value.end = step;
      ++value.reads;
      return now[reg];
    };
    write(0, -1);
    for (size_t i = 0; i < branch.steps.size(); ++i) {
      const ChainStep& s = branch.steps[i];
      Use use{read(s.src, (int64_t)i), read(s.add, (int64_t)i), -1};
      if (i + 1 < branch.steps.size()) {
        if (s.add != s.dst) write(s.dst, (int64_t)i);  // else in place: each element is read by who writes it
        use.dst = now[s.dst];
      }
      uses_.push_back(use);
    }
  }

  void place_values() {
    std::vector<int> order(values_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = (int)i;
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
      const Value &v = values_[a], &w = values_[b];
      return v.reads * (w.end - w.begin + 1) > w.reads * (v.end - v.begin + 1);
    });
    std::vector<const Value*> placed;
    for (const int i : order) {
      Value& value = values_[i];
      int64_t at = first_fit(placed, value, Space::kShared);
      Space space = Space::kShared;
      if (at + value.bytes > shared_room_) {
        space = Space::kScratch;
        at = first_fit(placed, value, space);
      }
      BRT_CHECK(at + value.bytes < (int64_t{1} << 31), "the images of a branch take more than 2 GiB");
      value.place = {space, (int)at};
      int64_t& end = ends_[space == Space::kScratch];
      end = std::max(end, at + value.bytes);
      placed.push_back(&value);
    }
  }

  static int64_t first_fit(const std::vector<const Value*>& placed, const Value& value, Space space) {
    std::vector<const Value*> beside;
    for (const Value* other : placed) {
      if (other->place.space == space && other->begin <= value.end && value.begin <= other->end) {
        beside.push_back(other);
      }
    }
    std::sort(beside.begin(), beside.end(), [](const Value* a, const Value* b) { return a->place.at < b->place.at; });
    int64_t at = 0;
    for (const Value* other : beside) {
      if (at + value.bytes <= other->place.at) break;
      at = std::max(at, other->place.at + other->bytes);
    }
    return at;
  }

  // A place that held an image of the same shape last has a border of zeros still.
  void find_clears(const Branch& branch) {
    std::vector<int> clean{0};
    for (size_t i = 0; i < uses_.size(); ++i) {
      const ChainStep& s = branch.steps[i];
      StepPlaces places{place_of(uses_[i].src), place_of(uses_[i].add), place_of(uses_[i].dst), 0};
      if (uses_[i].dst < 0) {
        places.dst = {Space::kResult, 0};
      } else if (uses_[i].dst != uses_[i].add && !is_clean(clean, values_[uses_[i].dst], uses_[i].dst)) {
        const bool filled = s.shuffle > 1 && values_[uses_[i].dst].image.channels % (kUnitBytes / element_bytes_) != 0;
        places.clear = filled ? 2 : 1;
      }
      steps_.push_back(places);
    }
  }

  Place place_of(int value) const { return value < 0 ? Place{Space::kNowhere, 0} : values_[value].place; }

  bool is_clean(std::vector<int>& clean, const Value& value, int index) const {
    std::vector<int> left;
    bool found = false;
    for (const int i : clean) {
      const Value& other = values_[i];
      if (other.place.space != value.place.space || other.place.at + other.bytes <= value.place.at ||
          value.place.at + value.bytes <= other.place.at) {
        left.push_back(i);
      } else if (other.place.at == value.place.at && other.image == value.image) {
        found = true;
      }
    }
    left.push_back(index);
    clean = std::move(left);
    return found;
  }

  int element_bytes_;
  int64_t shared_room_;
  std::vector<Value> values_;
  std::vector<Use> uses_;
  std::vector<StepPlaces> steps_;
  int64_t ends_[2] = {0, 0};
};

inline int type_code(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half ? 1 : t.scalar_type() == ScalarType::BFloat16 ? 2 : 0;
}

// The pieces of one step, without the places of its images.
inline std::vector<Piece> pieces_of(const ChainStep& s, int element_bytes) {
  BRT_CHECK(s.in_channels <= kMostInChannels, "on CUDA a convolution reads at most ", kMostInChannels,
            " channels, got ", s.in_channels);
  BRT_CHECK(s.out_channels < (1 << 20) && s.from.height < (1 << 14) && s.from.width < (1 << 14),
            "the image is too large: ", text_of(s.from));
  Piece piece{};
  piece.kernel = (int)s.kernel;
  piece.out_channels = (int)s.out_channels;
  piece.height = (int)s.from.height;
  piece.width = (int)s.from.width;
  piece.tiles_along = (piece.width + kTilePixels - 1) / kTilePixels;
  piece.num_tiles = (piece.height + kTileRows - 1) / kTileRows * piece.tiles_along;
  piece.num_taps = (int)(num_units(s.in_channels, element_bytes) * s.kernel);
  piece.dst_channels = (int)(s.out_channels / (s.shuffle * s.shuffle));
  piece.dst_units = (int)num_units(piece.dst_channels, element_bytes);
  piece.shuffle = (int)s.shuffle;
  piece.act = (int)s.act;
  piece.post = (int)s.post;
  piece.scale = s.scale;
  const int tiles = (int)((s.out_channels + kTileChannels - 1) / kTileChannels);
  int most = std::min(most_tiles(element_bytes), tiles);
  for (piece.tiles = most; most > 1 && piece_bytes(piece) > kPieceBytes; piece.tiles = most) --most;
  const int count = (tiles + most - 1) / most;
  std::vector<Piece> pieces;
  for (int i = 0, tile = 0; i < count; ++i) {
    piece.tiles = tiles / count + (i < tiles % count);
    piece.first_channel = tile * kTileChannels;
    tile += piece.tiles;
    pieces.push_back(piece);
  }
  return pieces;
}

inline int usual_finish(const Piece& p) {
  if (p.dst.space != Space::kShared || p.shuffle != 1 || p.post != 0) return 0;
  if (p.act == 1 && p.scale == 1.0f && p.add.space == Space::kNowhere) return kFinishRelu;
  return p.act == 0 && p.add.space == Space::kShared ? kFinishAdd : 0;
}

// `shared_limit`: the most shared memory that a block may ask for.
inline ChainPlan plan_of(const Chain& chain, const std::vector<Tensor>& params, int element_bytes,
                         int64_t shared_limit) {
  ChainPlan plan;
  // 1. Pieces, one branch after the other
  int64_t at = (int64_t)(chain.branches.size() * sizeof(Entry)), warps = 1;
  std::vector<std::vector<size_t>> first_jobs;  // of each step of each branch, and the end
  for (const Branch& branch : chain.branches) {
    plan.entries.push_back({(int)at, 0, {Space::kNowhere, 0}});
    first_jobs.emplace_back();
    const size_t first = plan.jobs.size();
    for (const ChainStep& s : branch.steps) {
      first_jobs.back().push_back(plan.jobs.size());
      for (const Piece& piece : pieces_of(s, element_bytes)) {
        PieceJob job{};
        job.piece = piece;
        job.weight = params[s.weight].const_data_ptr();
        job.weight_type = type_code(params[s.weight]);
        job.in_channels = (int)s.in_channels;
        if (s.bias >= 0) {
          job.bias = params[s.bias].const_data_ptr();
          job.bias_type = type_code(params[s.bias]);
        }
        if (s.slope >= 0) {
          job.slope = params[s.slope].const_data_ptr();
          job.slope_type = type_code(params[s.slope]);
          job.slope_step = params[s.slope].numel() == 1 ? 0 : 1;
        }
        job.to = at;
        at += piece_bytes(piece);
        if (plan.jobs.size() > first) plan.jobs.back().piece.next_bytes = piece_bytes(piece);
        plan.most_piece_bytes = std::max<int64_t>(plan.most_piece_bytes, piece_bytes(piece));
        plan.jobs.push_back(job);
      }
      warps = std::max<int64_t>(warps, plan.jobs.back().piece.num_tiles);
    }
    first_jobs.back().push_back(plan.jobs.size());
    plan.entries.back().first_bytes = piece_bytes(plan.jobs[first].piece);
  }
  BRT_CHECK(at < (int64_t{1} << 31), "the weights of a conv chain take more than 2 GiB");
  plan.packed_bytes = at;
  plan.num_warps = std::clamp<int64_t>(warps, 4, kMostWarps);
  // 2. Images
  const int64_t room = shared_limit - 2 * plan.most_piece_bytes;
  BRT_CHECK(room >= 0, "the convolutions of a chain are too wide for this device's shared memory");
  for (size_t b = 0; b < chain.branches.size(); ++b) {
    const Branch& branch = chain.branches[b];
    const BranchPlaces places(branch, element_bytes, room);
    plan.entries[b].cell = places.cell();
    for (size_t i = 0; i < branch.steps.size(); ++i) {
      for (size_t j = first_jobs[b][i]; j < first_jobs[b][i + 1]; ++j) {
        Piece& piece = plan.jobs[j].piece;
        piece.src = places.step(i).src;
        piece.add = places.step(i).add;
        piece.dst = places.step(i).dst;
        piece.clear = j == first_jobs[b][i] ? places.step(i).clear : 0;
        piece.finish = usual_finish(piece);
      }
    }
    plan.shared_bytes = std::max(plan.shared_bytes, places.shared_end());
    plan.scratch_bytes = std::max(plan.scratch_bytes, places.scratch_end());
  }
  plan.shared_bytes += 2 * plan.most_piece_bytes;
  return plan;
}

}  // namespace brt
