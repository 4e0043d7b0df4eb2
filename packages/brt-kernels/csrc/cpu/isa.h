// Which instruction set the CPU operators run on: found once, from the CPU at hand.
#pragma once

#include "simd/kernels.h"

namespace brt {

// The kernels of the best instruction set that this CPU has (or of a lower one that a test asked for).
// Raises where the CPU has none of them.
const Kernels& kernels();

}  // namespace brt
