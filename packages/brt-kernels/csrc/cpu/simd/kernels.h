// The inner loops that are built once for each instruction set, and the table that leads to them.
// No header of torch or of C++ here: see CMakeLists.txt.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace brt {

enum class Real : int { kFloat32, kFloat16, kBFloat16 };
enum class Activation : int { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSwiglu };

struct ConvStep;   // see conv_chain.h
struct ConvTask;   // see grouped_conv2d.h
struct GroupTask;  // see grouped_linear.h
struct OuterTask;  // see outer.h

struct Kernels {
  const char* name;

  // rows.cpp
  // Copies num_bytes; `stream` = past the caches.
  void (*copy_row)(void* dst, const void* src, int64_t num_bytes, bool stream);
  void (*zero_row)(void* dst, int64_t num_bytes, bool stream);
  // dst = weight * src
  void (*scale_row)(void* dst, const void* src, float weight, int64_t numel, Real type, bool stream);
  // dst = sum over k of weights[k] * rows[k]; weights null = 1
  void (*sum_rows)(void* dst, const void* const* rows, const float* weights, int64_t num_rows, int64_t numel,
                   Real type, bool stream);
  // the same of float32 rows into `type`
  void (*sum_float_rows)(void* dst, const float* const* rows, const float* weights, int64_t num_rows,
                         int64_t numel, Real type);
  float (*dot_row)(const void* a, const void* b, int64_t numel, Real type);
  void (*fence)();  // after the last streaming store of a thread

  // grouped_linear.cpp
  int64_t (*group_scratch_bytes)(const GroupTask& task);
  void (*group_task)(const GroupTask& task, void* scratch);

  // outer.cpp
  int64_t (*outer_scratch_numel)(int64_t num_rows, int64_t num_sums);
  void (*outer_task)(const OuterTask& task, float* scratch);

  // conv_chain.cpp
  int64_t (*conv_packed_numel)(int64_t out_channels, int64_t in_channels, int64_t kernel);
  void (*conv_pack)(float* packed, const float* weight, int64_t out_channels, int64_t in_channels, int64_t kernel);
  int64_t (*plane_numel)(int64_t channels, int64_t height, int64_t width);
  int64_t (*conv_scratch_numel)(const ConvStep& step);  // of its sizes only
  void (*plane_read)(float* plane, const float* image, int64_t channels, int64_t height, int64_t width, float* scratch);
  void (*plane_write)(float* image, const float* plane, int64_t channels, int64_t height, int64_t width, float* scratch);
  void (*conv_step)(const ConvStep& step, float* scratch);

  // grouped_conv2d.cpp
  int64_t (*conv_task_rows)(const ConvTask& task);  // of its sizes only
  int64_t (*conv_task_scratch_numel)(const ConvTask& task);
  void (*conv_task)(const ConvTask& task, float* scratch);
};

namespace avx2 { const Kernels* kernels(); }
namespace avx512 { const Kernels* kernels(); }
namespace avx512_bf16 { const Kernels* kernels(); }

}  // namespace brt
