#include "isa.h"

#include "../check.h"

#include <atomic>

namespace brt {
namespace {

bool has(const std::string& name) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  return name == "avx512_bf16" && avx512 && __builtin_cpu_supports("avx512bf16");
}

const Kernels* best() {
  if (has("avx512_bf16")) return avx512_bf16::kernels();
  if (has("avx512")) return avx512::kernels();
  if (has("avx2")) return avx2::kernels();
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* found = chosen.load(std::memory_order_acquire);
  if (!found) {
    found = best();
    BRT_CHECK(found, "this CPU has no AVX2 with FMA and F16C");
    chosen.store(found, std::memory_order_release);
  }
  return *found;
}

// "" tells what is in use ("none" on an old CPU); "best" or a name chooses.
std::string use_isa(std::string name) {
  if (!name.empty()) {
    BRT_CHECK(name == "best" || has(name), "isa must be best or one that this CPU has of avx2, avx512, "
              "avx512_bf16, got ", name);
    chosen = name == "best" ? best()
        : name == "avx2"    ? avx2::kernels()
        : name == "avx512"  ? avx512::kernels()
                            : avx512_bf16::kernels();
  }
  const Kernels* found = chosen.load();
  if (!found) found = best();
  return found ? found->name : "none";
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CompositeExplicitAutograd, m) { m.impl("use_isa", TORCH_BOX(&use_isa)); }

}  // namespace brt
