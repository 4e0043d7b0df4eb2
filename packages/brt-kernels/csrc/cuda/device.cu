// Whether the CUDA kernels can run here: "" or why not.
#include "common.cuh"

namespace brt {

std::string cuda_refusal() {
  int driver = 0, runtime = 0, count = 0, major = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess) {
    return "the CUDA driver does not answer";
  }
  if (driver / 1000 < runtime / 1000) {
    return "the driver runs CUDA " + std::to_string(driver / 1000) + ", these kernels need CUDA " +
        std::to_string(runtime / 1000);
  }
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) return "no CUDA device";
  for (int i = 0; i < count; ++i) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i) != cudaSuccess || major < 8) {
      return "device " + std::to_string(i) + " is older than sm_80";
    }
  }
  return "";
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CompositeExplicitAutograd, m) { m.impl("cuda_refusal", TORCH_BOX(&cuda_refusal)); }

}  // namespace brt
