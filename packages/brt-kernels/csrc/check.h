// Checks and small helpers that every operator's host side uses.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace brt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define BRT_CHECK STD_TORCH_CHECK

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Short: return "int16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_index(ScalarType type) { return type == ScalarType::Int || type == ScalarType::Long; }

inline bool is_real(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

// What can be moved without a look at its values.
inline bool is_movable(ScalarType type) {
  return is_real(type) || is_index(type) || type == ScalarType::Double || type == ScalarType::Bool ||
      type == ScalarType::Byte || type == ScalarType::Char || type == ScalarType::Short;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.is_cpu() == b.is_cpu() &&
      a.get_device_index() == b.get_device_index();
}

inline void check_index(const Tensor& t, const char* name, int64_t rank) {
  BRT_CHECK(t.dim() == rank, name, " must be ", rank, "-D, got ", shape_of(t));
  BRT_CHECK(is_index(t.scalar_type()), name, " must be int32 or int64, got ", dtype_name(t.scalar_type()));
}

inline void check_real(const Tensor& t, const char* name) {
  BRT_CHECK(is_real(t.scalar_type()), name, " must be float32, float16 or bfloat16, got ",
            dtype_name(t.scalar_type()));
}

inline void check_device(const Tensor& t, const char* name, const Tensor& like) {
  BRT_CHECK(same_device(t, like), name, " is on another device than the first tensor");
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// An int64, contiguous copy, or the tensor itself where it is one already.
inline Tensor as_int64(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Long) return as_contiguous(t);
  return as_contiguous(torch::stable::to(t, std::make_optional(ScalarType::Long)));
}

inline Tensor as_float32(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return as_contiguous(t);
  return as_contiguous(torch::stable::to(t, std::make_optional(ScalarType::Float)));
}

// NOTES: Large tensors are mapped anew by each call, and touching them for the first time, 4 KiB at a time, costs more
// than most kernels here. Where the system grants huge pages on request, this is the request.
inline Tensor new_empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  constexpr size_t kHugePage = size_t{2} << 20;
  Tensor made = torch::stable::new_empty(like, shape, type);
#ifdef MADV_HUGEPAGE
  const size_t num_bytes = static_cast<size_t>(made.numel()) * made.element_size();
  if (made.is_cpu() && num_bytes >= 2 * kHugePage) {
    const uintptr_t first = reinterpret_cast<uintptr_t>(made.mutable_data_ptr());
    const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (first + num_bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: as it was
  }
#endif
  return made;
}

// The shape of `t` with its first size replaced: a [N, S...] to a [R, S...].
inline std::vector<int64_t> with_rows(const Tensor& t, int64_t num_rows) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape[0] = num_rows;
  return shape;
}

inline int64_t row_numel(const Tensor& t) {
  int64_t numel = 1;
  for (int64_t i = 1; i < t.dim(); ++i) numel *= t.size(i);
  return numel;
}

// a * b + c, or an error where it does not fit: sizes come from the caller.
inline int64_t checked_size(int64_t a, int64_t b, int64_t c) {
  int64_t product = 0, sum = 0;
  BRT_CHECK(a >= 0 && b >= 0 && c >= 0 && !__builtin_mul_overflow(a, b, &product) &&
                !__builtin_add_overflow(product, c, &sum) && sum < (int64_t{1} << 46),
            "size ", a, " * ", b, " + ", c, " is out of range");
  return sum;
}

// The weight [P, O, I] and bias [P, O] of a grouped linear layer that takes x.
inline void check_weight(const Tensor& weight, const std::optional<Tensor>& bias, const char* name, const Tensor& x,
                  int64_t num_paths, int64_t num_in) {
  BRT_CHECK(weight.dim() == 3 && weight.size(0) == num_paths && weight.size(2) == num_in, name, " must be [",
            num_paths, ", out, ", num_in, "], got ", shape_of(weight));
  BRT_CHECK(weight.scalar_type() == x.scalar_type(), name, " must be ", dtype_name(x.scalar_type()), " as x, got ",
            dtype_name(weight.scalar_type()));
  check_device(weight, name, x);
  if (!bias.has_value()) return;
  BRT_CHECK(bias->dim() == 2 && bias->size(0) == num_paths && bias->size(1) == weight.size(1), "the bias of ", name,
            " must be [", num_paths, ", ", weight.size(1), "], got ", shape_of(*bias));
  BRT_CHECK(bias->scalar_type() == x.scalar_type(), "the bias of ", name, " must be ", dtype_name(x.scalar_type()),
            " as x, got ", dtype_name(bias->scalar_type()));
  check_device(*bias, name, x);
}

}  // namespace brt
