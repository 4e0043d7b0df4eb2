// Whether the CUDA kernels can run here, and what they found wrong: each "" or a message.
#include "device_error.cuh"

#include <atomic>
#include <cstddef>
#include <mutex>

namespace brt {
namespace {

constexpr int kMaxDevices = 128;

__device__ ErrorWord word_of_device;

struct Slot {
  std::atomic<ErrorWord*> word{nullptr};
  volatile BadIndex* found = nullptr;
};
Slot slots[kMaxDevices];
std::mutex slots_mutex;

struct Name {
  const char *op, *argument;
  bool offsets;
};
constexpr Name kNames[] = {
    {"", "", false},
    {"route", "choice_NK", false},
    {"dispatch", "cell_R", false},
    {"combine", "row_NK", false},
    {"row_dot", "cell_R", false},
    {"grouped_linear", "offsets_P1", true},
    {"grouped_outer", "offsets_P1", true},
    {"expert_mlp", "cell_R", false},
    {"expert_mlp", "row_NK", false},
    {"expert_mlp", "offsets_P1", true},
};
static_assert(sizeof(kNames) / sizeof(Name) == static_cast<int>(Where::kMlpOffsets) + 1, "a name for each place");

// While it lives, this thread may make what a capture forbids: it goes into no graph.
class OutsideCapture {
 public:
  OutsideCapture() { BRT_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Writes the word of the current device, now: on a stream of its own, which no capture waits for.
void write_word(void* to, const ErrorWord& value) {
  cudaStream_t stream = nullptr;
  BRT_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const cudaError_t copied = cudaMemcpyAsync(to, &value, sizeof value, cudaMemcpyHostToDevice, stream);
  const cudaError_t waited = cudaStreamSynchronize(stream);
  cudaStreamDestroy(stream);
  BRT_CUDA_CHECK(copied);
  BRT_CUDA_CHECK(waited);
}

}  // namespace

ErrorWord* error_word() {
  int device = 0;
  BRT_CUDA_CHECK(cudaGetDevice(&device));
  BRT_CHECK(device < kMaxDevices, "device ", device, " is beyond the ", kMaxDevices, " that have an error word");
  Slot& slot = slots[device];
  if (ErrorWord* word = slot.word.load(std::memory_order_acquire)) return word;
  const std::lock_guard<std::mutex> lock(slots_mutex);
  if (ErrorWord* word = slot.word.load(std::memory_order_acquire)) return word;
  const OutsideCapture outside;
  void *found = nullptr, *found_there = nullptr, *word = nullptr;
  BRT_CUDA_CHECK(cudaGetSymbolAddress(&word, word_of_device));
  BRT_CUDA_CHECK(cudaHostAlloc(&found, sizeof(BadIndex), cudaHostAllocMapped | cudaHostAllocPortable));
  BRT_CUDA_CHECK(cudaHostGetDevicePointer(&found_there, found, 0));
  *static_cast<BadIndex*>(found) = BadIndex{};
  write_word(word, ErrorWord{0, static_cast<BadIndex*>(found_there)});
  slot.found = static_cast<BadIndex*>(found);
  slot.word.store(static_cast<ErrorWord*>(word), std::memory_order_release);
  return static_cast<ErrorWord*>(word);
}

// What a kernel found wrong first on a device since the last call, which it clears. wait: for the device's work before.
std::string device_error(int64_t device, bool wait) {
  if (device < 0 || device >= kMaxDevices) return "";
  Slot& slot = slots[device];
  ErrorWord* word = slot.word.load(std::memory_order_acquire);
  if (word == nullptr) return "";
  int before = 0;
  if (wait) {
    BRT_CUDA_CHECK(cudaGetDevice(&before));
    BRT_CUDA_CHECK(cudaSetDevice(static_cast<int>(device)));
    const cudaError_t done = cudaDeviceSynchronize();
    cudaSetDevice(before);
    BRT_CUDA_CHECK(done);
  }
  const std::lock_guard<std::mutex> lock(slots_mutex);
  const int where = slot.found->where;
  if (where == 0) return "";
  std::atomic_thread_fence(std::memory_order_acquire);
  const Name& name = kNames[where];
  const std::string bound = std::to_string(slot.found->bound);
  const std::string text = std::string(name.op) + ": " + name.argument +
      (name.offsets ? " must rise from 0 to at most " + bound : " must be in [-1, " + bound + ")") + ", got " +
      std::to_string(slot.found->value) + " at position " + std::to_string(slot.found->position);
  slot.found->where = 0;
  const OutsideCapture outside;
  BRT_CUDA_CHECK(cudaGetDevice(&before));
  BRT_CUDA_CHECK(cudaSetDevice(static_cast<int>(device)));
  void* there = nullptr;
  BRT_CUDA_CHECK(cudaHostGetDevicePointer(&there, const_cast<BadIndex*>(slot.found), 0));
  write_word(word, ErrorWord{0, static_cast<BadIndex*>(there)});
  cudaSetDevice(before);
  return text;
}

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

// Where the error word of a device lies, for kernels that are compiled elsewhere: `tell` of
// src/brt_kernels/triton/tell.py writes it by these offsets.
static_assert(offsetof(ErrorWord, taken) == 0 && offsetof(ErrorWord, found) == 8 && offsetof(BadIndex, where) == 0 &&
              offsetof(BadIndex, value) == 8 && offsetof(BadIndex, bound) == 16 && offsetof(BadIndex, position) == 24);
int64_t error_word_address(int64_t device) {
  int before = 0;
  BRT_CUDA_CHECK(cudaGetDevice(&before));
  BRT_CUDA_CHECK(cudaSetDevice(static_cast<int>(device)));
  const ErrorWord* word = error_word();
  cudaSetDevice(before);
  return reinterpret_cast<int64_t>(word);
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&cuda_refusal));
  m.impl("error_word", TORCH_BOX(&error_word_address));
  m.impl("device_error", TORCH_BOX(&device_error));
}

}  // namespace brt
