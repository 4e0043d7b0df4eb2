// What kernels find wrong with the indices they are given, told to the host without stopping the device.
//
// A kernel that meets a bad index leaves that access out and goes on. The first one since the host last asked is kept
// for each device: its operator and argument, value, bound and position.
#pragma once

#include "common.cuh"

namespace brt {

// The operator and the argument of a bad index; names are in device.cu.
enum class Where : int {
  kNowhere,
  kRouteChoice,
  kDispatchCell,
  kCombineRow,
  kRowDotCell,
  kLinearOffsets,
  kOuterOffsets,
  kMlpCell,
  kMlpRow,
  kMlpOffsets,
};

// In page-locked host memory that the device writes, so that reading it costs the host nothing.
struct BadIndex {
  int where;  // written last; 0: none
  long long value, bound, position;
};

// In device memory: the atomic that decides who is first must not go over the bus.
struct ErrorWord {
  int taken;
  BadIndex* found;
};

// The word of the current device. Made at the first call, which may be in the middle of a capture.
ErrorWord* error_word();

__device__ inline void tell(ErrorWord* word, Where where, int64_t value, int64_t bound, int64_t position) {
  if (atomicCAS(&word->taken, 0, 1) != 0) return;
  volatile BadIndex* found = word->found;
  found->value = value;
  found->bound = bound;
  found->position = position;
  __threadfence_system();
  found->where = static_cast<int>(where);
}

// Offsets must rise from 0 to at most num_rows. Called by all threads of one block.
__device__ inline void check_offsets(ErrorWord* word, Where where, const int64_t* offsets, int num_paths,
                                     int64_t num_rows) {
  for (int p = threadIdx.x; p <= num_paths; p += blockDim.x) {
    const int64_t value = offsets[p];
    if (value < (p ? offsets[p - 1] : 0) || value > num_rows) tell(word, where, value, num_rows, p);
  }
}

}  // namespace brt
