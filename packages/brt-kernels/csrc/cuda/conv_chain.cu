// conv_chain: a small convolutional branch for each cell, the branches of a region in one launch.
//
// A block takes one cell through all steps of its branch; which branch that is it finds in the offsets. Three files:
// conv_chain_plan.cuh says where images and weights lie, conv_chain_kernel.cuh computes, this one checks and launches.
#include "conv_chain_kernel.cuh"

namespace brt {
namespace {

int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  BRT_CUDA_CHECK(cudaGetDevice(&device));
  BRT_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

ChainPlan plan_here(const Chain& chain, const std::vector<Tensor>& params, const Tensor& x) {
  constexpr int kStatic = 128;  // what the kernel has besides
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic;
  return plan_of(chain, params, (int)x.element_size(), limit);
}

std::vector<Tensor> all_contiguous(const std::vector<Tensor>& params) {
  std::vector<Tensor> made;
  for (const Tensor& t : params) made.push_back(as_contiguous(t));
  return made;
}

// Ends with the stream idle: other streams may use what was packed.
void pack(const ChainPlan& plan, const Tensor& x, const Tensor& packed, cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  BRT_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
  BRT_CHECK(capture == cudaStreamCaptureStatusNone, "the weights of a conv chain cannot be packed while a CUDA graph "
            "is captured: run it once before");
  const int64_t entries_bytes = (int64_t)(plan.entries.size() * sizeof(Entry));
  const int64_t jobs_bytes = (int64_t)(plan.jobs.size() * sizeof(PieceJob));
  const Tensor jobs = new_empty(x, {jobs_bytes}, ScalarType::Byte);
  BRT_CUDA_CHECK(cudaMemcpyAsync(mutable_data_of<char>(packed), plan.entries.data(), entries_bytes,
                                 cudaMemcpyHostToDevice, stream));
  BRT_CUDA_CHECK(cudaMemcpyAsync(mutable_data_of<char>(jobs), plan.jobs.data(), jobs_bytes, cudaMemcpyHostToDevice,
                                 stream));
  with_real(x, [&](auto zero) {
    using T = decltype(zero);
    pack_pieces<T><<<blocks_for((int64_t)plan.jobs.size(), 1), 128, 0, stream>>>(
        reinterpret_cast<const PieceJob*>(data_of<char>(jobs)), mutable_data_of<char>(packed));
  });
  BRT_LAUNCHED();
  BRT_CUDA_CHECK(cudaStreamSynchronize(stream));
}

template <class T>
void launch(ChainCall<T> call, const ChainPlan& plan, const Tensor& x, cudaStream_t stream) {
  const auto kernel = run_chain<T>;
  const int threads = (int)plan.num_warps * 32, shared = (int)plan.shared_bytes;
  BRT_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  // Blocks in turn, unless each needs a part of the scratch memory: then as many as run at a time
  int64_t blocks = call.num_rows;
  if (plan.scratch_bytes > 0) {
    int each = 0;
    BRT_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared));
    blocks = std::min<int64_t>(blocks, int64_t{std::max(each, 1)} * device_attribute(cudaDevAttrMultiProcessorCount));
  }
  call.scratch_bytes = plan.scratch_bytes;
  const Tensor scratch = new_empty(x, {checked_size(blocks, plan.scratch_bytes, 0)}, ScalarType::Byte);
  call.scratch = mutable_data_of<char>(scratch);
  kernel<<<blocks_for(blocks, 1), threads, shared, stream>>>(call);
  BRT_LAUNCHED();
}

}  // namespace

Tensor conv_chain_pack_cuda(const Tensor& x, const Tensor& offsets, std::vector<Tensor> params,
                            std::vector<int64_t> steps, std::vector<int64_t> step_offsets,
                            std::vector<double> scales) {
  const Chain chain = checked_chain(x, offsets, params, steps, step_offsets, scales);
  const OnDevice device(x);
  const std::vector<Tensor> whole = all_contiguous(params);
  const ChainPlan plan = plan_here(chain, whole, x);
  Tensor packed = new_empty(x, {plan.packed_bytes}, ScalarType::Byte);
  pack(plan, x, packed, device.stream());
  return packed;
}

Tensor conv_chain_cuda(const Tensor& x, const Tensor& offsets, std::vector<Tensor> params, std::vector<int64_t> steps,
                       std::vector<int64_t> step_offsets, std::vector<double> scales, std::optional<Tensor> packed) {
  // 1. Shapes
  const Chain chain = checked_chain(x, offsets, params, steps, step_offsets, scales);
  const Image& out = chain.out;
  const OnDevice device(x);
  const int64_t num_rows = x.size(0);
  Tensor out_RCHW = new_empty(x, {num_rows, out.channels, out.height, out.width}, x.scalar_type());
  if (out_RCHW.numel() == 0) return out_RCHW;

  // 2. Weights
  const std::vector<Tensor> whole = packed.has_value() ? params : all_contiguous(params);
  const ChainPlan plan = plan_here(chain, whole, x);
  if (packed.has_value()) {
    BRT_CHECK(packed->scalar_type() == ScalarType::Byte && same_device(*packed, x) && packed->is_contiguous() &&
                  packed->dim() == 1 && packed->size(0) == plan.packed_bytes && aligned16(packed->const_data_ptr()),
              "packed must be what conv_chain_pack made of the same chain: uint8 [", plan.packed_bytes, "], got ",
              dtype_name(packed->scalar_type()), shape_of(*packed));
  } else {
    packed = new_empty(x, {plan.packed_bytes}, ScalarType::Byte);
    pack(plan, x, *packed, device.stream());
  }

  // 3. One launch
  const Tensor x_RCHW = as_contiguous(x), offsets_P1 = as_int64(offsets);
  with_real(x, [&](auto zero) {
    using T = decltype(zero);
    ChainCall<T> call{};
    call.x = data_of<T>(x_RCHW);
    call.out = mutable_data_of<T>(out_RCHW);
    call.offsets = data_of<int64_t>(offsets_P1);
    call.packed = data_of<char>(*packed);
    call.num_rows = num_rows;
    call.x_numel = row_numel(x_RCHW);
    call.out_numel = row_numel(out_RCHW);
    call.num_paths = (int)chain.branches.size();
    call.piece_bytes = (int)plan.most_piece_bytes;
    call.channels = (int)x.size(1);
    call.height = (int)x.size(2);
    call.width = (int)x.size(3);
    launch<T>(call, plan, x_RCHW, device.stream());
  });
  return out_RCHW;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) {
  m.impl("conv_chain_pack", TORCH_BOX(&conv_chain_pack_cuda));
  m.impl("conv_chain", TORCH_BOX(&conv_chain_cuda));
}

}  // namespace brt
