// conditional_begin, conditional_end: what is captured between them runs only where a flag is set.
//
// The stream that is current must be capturing. The body is captured on a stream of its own, which the caller makes
// current in between; it may hold kernels, copies, fills and further conditionals.
#include "common.cuh"

namespace brt {
namespace {

__global__ void set_conditional(cudaGraphConditionalHandle handle, const bool* flag) {
  cudaGraphSetConditional(handle, *flag ? 1u : 0u);
}

cudaGraph_t capturing_graph(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  BRT_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph));
  BRT_CHECK(status == cudaStreamCaptureStatusActive, "conditional_begin: the current stream captures no graph");
  return graph;
}

}  // namespace

int64_t conditional_begin_cuda(const Tensor& flag_1, int64_t body_stream) {
  BRT_CHECK(flag_1.scalar_type() == ScalarType::Bool && flag_1.numel() == 1, "flag_1 must be one bool, got ",
            dtype_name(flag_1.scalar_type()), shape_of(flag_1));
  const OnDevice device(flag_1);
  const cudaStream_t stream = device.stream();
  // 1. The value, by a kernel of the graph
  cudaGraph_t graph = capturing_graph(stream);
  cudaGraphConditionalHandle handle;
  BRT_CUDA_CHECK(cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault));
  set_conditional<<<1, 1, 0, stream>>>(handle, static_cast<const bool*>(flag_1.const_data_ptr()));
  BRT_LAUNCHED();
  // 2. The node, behind all that the stream did
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaGraphNode_t* before = nullptr;
  const cudaGraphEdgeData* edges = nullptr;
  size_t num_before = 0;
  BRT_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph, &before, &edges, &num_before));
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeIf;
  params.conditional.size = 1;
  cudaGraphNode_t node = nullptr;
  BRT_CUDA_CHECK(cudaGraphAddNode(&node, graph, before, edges, num_before, &params));
  BRT_CUDA_CHECK(cudaStreamUpdateCaptureDependencies(stream, &node, nullptr, 1, cudaStreamSetCaptureDependencies));
  // 3. Its body
  BRT_CUDA_CHECK(cudaStreamBeginCaptureToGraph(reinterpret_cast<cudaStream_t>(body_stream),
                                               params.conditional.phGraph_out[0], nullptr, nullptr, 0,
                                               cudaStreamCaptureModeRelaxed));
  return 0;
}

int64_t conditional_end(int64_t body_stream) {
  cudaGraph_t body = nullptr;
  BRT_CUDA_CHECK(cudaStreamEndCapture(reinterpret_cast<cudaStream_t>(body_stream), &body));
  return 0;
}

// Not in library.cpp: the CPU library, which it is built into, has nothing to implement of these.
STABLE_TORCH_LIBRARY_FRAGMENT(brt_kernels, m) {
  m.def("conditional_begin(Tensor flag_1, int body_stream) -> int");
  m.def("conditional_end(int body_stream) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) { m.impl("conditional_begin", TORCH_BOX(&conditional_begin_cuda)); }

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CompositeExplicitAutograd, m) {
  m.impl("conditional_end", TORCH_BOX(&conditional_end));
}

}  // namespace brt
