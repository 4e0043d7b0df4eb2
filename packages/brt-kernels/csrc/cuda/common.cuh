// What every CUDA operator's host side uses, and vectors of elements for its kernels.
#pragma once

#include "../check.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace brt {

#define BRT_CUDA_CHECK(call)                                                          \
  do {                                                                                \
    const cudaError_t brt_error = (call);                                             \
    BRT_CHECK(brt_error == cudaSuccess, "CUDA: ", cudaGetErrorString(brt_error));     \
  } while (0)

#define BRT_LAUNCHED() BRT_CUDA_CHECK(cudaGetLastError())

// The tensor's device while it lives, and torch's current stream there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    BRT_CHECK(t.is_cuda(), "expected a CUDA tensor");
    BRT_CUDA_CHECK(cudaGetDevice(&before_));
    BRT_CUDA_CHECK(cudaSetDevice(t.get_device_index()));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
};

inline unsigned blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  BRT_CHECK(blocks < (int64_t{1} << 31), work, " pieces of work are too many for one launch");
  return static_cast<unsigned>(blocks);
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T v[kCount];
};

// Calls f with a value of the element type of `t`, which has been checked.
template <class F>
void with_real(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default: return f(float{});
  }
}

template <class T>
const T* data_of(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T>
T* mutable_data_of(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline std::optional<Tensor> checked_row_weights(const std::optional<Tensor>& weight_R, int64_t num_rows,
                                                 const Tensor& like) {
  if (!weight_R.has_value()) return std::nullopt;
  check_real(*weight_R, "weight_R");
  check_device(*weight_R, "weight_R", like);
  BRT_CHECK(weight_R->dim() == 1 && weight_R->size(0) == num_rows, "weight_R must be [", num_rows, "], got ",
            shape_of(*weight_R));
  return as_float32(*weight_R);
}

// How the threads of a block of 256 share rows: `x` along a row, 256 / x rows.
inline dim3 row_block(int64_t vectors_of_row) {
  unsigned x = 1;
  while (x < 256 && x < vectors_of_row) x *= 2;
  return dim3(x, 256 / x);
}

}  // namespace brt
