// Many products of matrices, over all threads.
#pragma once

#include "movement.h"
#include "simd/outer.h"

namespace brt {

// Runs every product, cut into parts of about equal work. `like` says where scratch memory is taken.
void run_products(const std::vector<OuterTask>& products, const Tensor& like, const Kernels& k);

}  // namespace brt
