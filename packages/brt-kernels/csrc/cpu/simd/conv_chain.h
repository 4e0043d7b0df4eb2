// One step of a conv chain on one cell: a convolution whose images stay in cache.
#pragma once

#include <stdint.h>

namespace brt {

// dst = shuffle(post(act(conv(src) + bias) * scale + add))
struct ConvStep {
  const float* src;     // a plane of in_channels
  float* dst;           // a plane of out_channels / shuffle^2, other than src
  const float* add;     // a plane like the convolution's result, may be dst; or null
  const float* packed;  // what conv_pack wrote
  const float* bias;    // [out_channels], or null
  const float* slope;   // [out_channels]: PReLU; null: none, unless relu
  float scale;
  bool relu, post_relu;
  int64_t in_channels, out_channels, height, width, kernel, shuffle;
};

#ifdef BRT_ISA
namespace BRT_ISA {

int64_t conv_packed_numel(int64_t out_channels, int64_t in_channels, int64_t kernel);
void conv_pack(float* packed, const float* weight, int64_t out_channels, int64_t in_channels, int64_t kernel);
int64_t plane_numel(int64_t channels, int64_t height, int64_t width);
int64_t conv_scratch_numel(const ConvStep& step);
void plane_read(float* plane, const float* image, int64_t channels, int64_t height, int64_t width, float* scratch);
void plane_write(float* image, const float* plane, int64_t channels, int64_t height, int64_t width, float* scratch);
void conv_step(const ConvStep& step, float* scratch);

}  // namespace BRT_ISA
#endif

}  // namespace brt
