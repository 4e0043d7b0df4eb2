// conv_chain: a small convolutional branch for each cell, the branches of a region in one launch.
//
// A block takes one cell through all steps of its branch; which branch that is it finds in the offsets. Three files:
// conv_chain_plan.cuh says where images and weights lie, conv_chain_kernel.cuh computes, this one checks and launches.
#include "conv_chain_kernel.cuh"

#include <cstring>

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

// What a launch needs of a chain, in few numbers: to plan thousands of steps anew takes longer than to compute them.
struct Shape {
  int64_t num_paths, in[3], out[3], packed_bytes, most_piece_bytes, shared_bytes, scratch_bytes, num_warps;
};
constexpr size_t kShapeNumbers = sizeof(Shape) / sizeof(int64_t);

Shape shape_of_plan(const Chain& chain, const ChainPlan& plan, const Tensor& x) {
  return {(int64_t)chain.branches.size(), {x.size(1), x.size(2), x.size(3)},
          {chain.out.channels, chain.out.height, chain.out.width}, plan.packed_bytes, plan.most_piece_bytes,
          plan.shared_bytes, plan.scratch_bytes, plan.num_warps};
}

void check_packed(const Tensor& packed, const Tensor& x, const Shape& shape) {
  BRT_CHECK(packed.scalar_type() == ScalarType::Byte && same_device(packed, x) && packed.is_contiguous() &&
                packed.dim() == 1 && packed.size(0) == shape.packed_bytes && aligned16(packed.const_data_ptr()),
            "packed must be what conv_chain_pack made of the same chain: uint8 [", shape.packed_bytes, "], got ",
            dtype_name(packed.scalar_type()), shape_of(packed));
}

template <class T>
void launch(ChainCall<T> call, const Shape& plan, const Tensor& x, cudaStream_t stream) {
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

// One launch for all cells.
Tensor run(const Tensor& x, const Tensor& offsets, const Tensor& packed, const Shape& shape, cudaStream_t stream) {
  const int64_t num_rows = x.size(0);
  Tensor out_RCHW = new_empty(x, {num_rows, shape.out[0], shape.out[1], shape.out[2]}, x.scalar_type());
  if (out_RCHW.numel() == 0) return out_RCHW;
  const Tensor x_RCHW = as_contiguous(x), offsets_P1 = as_int64(offsets);
  with_real(x, [&](auto zero) {
    using T = decltype(zero);
    ChainCall<T> call{};
    call.x = data_of<T>(x_RCHW);
    call.out = mutable_data_of<T>(out_RCHW);
    call.offsets = data_of<int64_t>(offsets_P1);
    call.packed = data_of<char>(packed);
    call.num_rows = num_rows;
    call.x_numel = row_numel(x_RCHW);
    call.out_numel = row_numel(out_RCHW);
    call.num_paths = (int)shape.num_paths;
    call.piece_bytes = (int)shape.most_piece_bytes;
    call.channels = (int)shape.in[0];
    call.height = (int)shape.in[1];
    call.width = (int)shape.in[2];
    launch<T>(call, shape, x_RCHW, stream);
  });
  return out_RCHW;
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
  const OnDevice device(x);
  const std::vector<Tensor> whole = packed.has_value() ? params : all_contiguous(params);
  const ChainPlan plan = plan_here(chain, whole, x);
  const Shape shape = shape_of_plan(chain, plan, x);

  // 2. Weights
  if (packed.has_value()) {
    check_packed(*packed, x, shape);
  } else if (x.size(0) > 0) {
    packed = new_empty(x, {plan.packed_bytes}, ScalarType::Byte);
    pack(plan, x, *packed, device.stream());
  } else {
    packed = x;  // nothing reads it
  }
  return run(x, offsets, *packed, shape, device.stream());
}

// The numbers of Shape, as words: for conv_chain_planned.
std::string conv_chain_plan_cuda(const Tensor& x, const Tensor& offsets, std::vector<Tensor> params,
                                 std::vector<int64_t> steps, std::vector<int64_t> step_offsets,
                                 std::vector<double> scales) {
  const Chain chain = checked_chain(x, offsets, params, steps, step_offsets, scales);
  const OnDevice device(x);
  const Shape shape = shape_of_plan(chain, plan_here(chain, params, x), x);
  std::string words;
  for (size_t i = 0; i < kShapeNumbers; ++i) {
    words += std::to_string(reinterpret_cast<const int64_t*>(&shape)[i]) + " ";
  }
  return words;
}

Tensor conv_chain_planned_cuda(const Tensor& x, const Tensor& offsets, const Tensor& packed,
                               std::vector<int64_t> plan) {
  BRT_CHECK(plan.size() == kShapeNumbers, "a plan has ", kShapeNumbers, " numbers, got ", plan.size());
  Shape shape;
  std::memcpy(&shape, plan.data(), sizeof shape);
  check_real(x, "x_RCHW");
  check_index(offsets, "offsets_P1", 1);
  check_device(offsets, "offsets_P1", x);
  BRT_CHECK(x.dim() == 4 && x.size(1) == shape.in[0] && x.size(2) == shape.in[1] && x.size(3) == shape.in[2] &&
                offsets.size(0) == shape.num_paths + 1,
            "the plan is for rows [", shape.in[0], ", ", shape.in[1], ", ", shape.in[2], "] of ", shape.num_paths,
            " paths, got ", shape_of(x), " and offsets ", shape_of(offsets));
  check_packed(packed, x, shape);
  const OnDevice device(x);
  return run(x, offsets, packed, shape, device.stream());
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CUDA, m) {
  m.impl("conv_chain_pack", TORCH_BOX(&conv_chain_pack_cuda));
  m.impl("conv_chain", TORCH_BOX(&conv_chain_cuda));
  m.impl("conv_chain_plan", TORCH_BOX(&conv_chain_plan_cuda));
  m.impl("conv_chain_planned", TORCH_BOX(&conv_chain_planned_cuda));
}

}  // namespace brt
