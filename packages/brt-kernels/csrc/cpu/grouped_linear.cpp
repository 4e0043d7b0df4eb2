// grouped_linear: rows of path p times weight[p].T plus bias[p], activated.
// R rows, P paths, I features in, O features out.
#include "grouped.h"
#include "outer.h"

#include <algorithm>
#include <atomic>

namespace brt {
namespace {

constexpr int64_t kWeightBytes = int64_t{384} << 10;  // rows of a weight that one task takes
constexpr int64_t kSplitRows = 96;                    // rows of a task where there are few tasks

struct Job { int64_t path, out, num_out, row, num_rows; };

std::vector<Job> jobs_of(const GroupedLinear& g, int64_t num_out, int64_t num_in, int64_t element) {
  // 1. How many features a task takes
  const int64_t threads = torch::stable::get_num_threads(), num_paths = (int64_t)g.begins.size() - 1;
  int64_t width = std::clamp<int64_t>(kWeightBytes / std::max<int64_t>(num_in * element, 1) / 16 * 16, 16, 256);
  width = std::min(width, (num_out + 3) / 4 * 4);
  int64_t num_live = 0;
  for (int64_t p = 0; p < num_paths; ++p) num_live += g.begins[p + 1] > g.begins[p];
  while (width > 16 && num_live * ((num_out + width - 1) / width) < 4 * threads) width = (width / 2 + 3) / 4 * 4;
  const bool split = num_live * ((num_out + width - 1) / width) < 4 * threads && threads > 1;
  // 2. One task for every such part of every path; the longest first, so that threads end together
  std::vector<Job> jobs;
  for (int64_t p = 0; p < num_paths; ++p) {
    const int64_t num_rows = g.begins[p + 1] - g.begins[p], step = split ? kSplitRows : std::max<int64_t>(num_rows, 1);
    for (int64_t row = 0; row < num_rows; row += step) {
      for (int64_t o = 0; o < num_out; o += width) {
        jobs.push_back({p, o, std::min(width, num_out - o), g.begins[p] + row, std::min(step, num_rows - row)});
      }
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.num_rows > b.num_rows; });
  return jobs;
}

// Whether weight_POI is a transposed view of a contiguous [P, I, O], as in the gradient of the input.
bool is_transposed(const Tensor& weight) {
  return weight.size(1) > 1 && weight.size(2) > 1 && weight.stride(1) == 1 && weight.stride(2) == weight.size(1) &&
      (weight.size(0) == 1 || weight.stride(0) == weight.size(1) * weight.size(2));
}

std::vector<OuterTask> products_of(const std::vector<int64_t>& begins, const Tensor& x_RI, const Tensor& weight,
                                   char* out) {
  const int64_t num_in = weight.size(2), num_out = weight.size(1), element = (int64_t)x_RI.element_size();
  const char* from = static_cast<const char*>(x_RI.const_data_ptr());
  const char* weights = static_cast<const char*>(weight.const_data_ptr());
  std::vector<OuterTask> products;
  for (int64_t p = 0; p + 1 < (int64_t)begins.size(); ++p) {
    products.push_back({from + begins[p] * num_in * element, weights + p * num_in * num_out * element,
                        out + begins[p] * num_out * element, num_in, 1, num_out, num_out, begins[p + 1] - begins[p],
                        num_in, num_out, real_of(x_RI)});
  }
  return products;
}

}  // namespace

void GroupedLinear::run(const Kernels& k) const {
  const bool gated = activation == Activation::kSwiglu;
  const int64_t num_in = weight_POI.size(2), weight_rows = weight_POI.size(1), num_out = weight_rows / (gated ? 2 : 1);
  const int64_t element = (int64_t)weight_POI.element_size();
  const int64_t out_element = out_type == Real::kFloat32 ? 4 : 2;
  const std::vector<Job> jobs = jobs_of(*this, num_out, num_in, element);
  if (jobs.empty() || num_out == 0) return;
  // 1. Each job as the kernels take it
  const char* weight = static_cast<const char*>(weight_POI.const_data_ptr());
  const char* bias = bias_PO ? static_cast<const char*>(bias_PO->const_data_ptr()) : nullptr;
  const Real type = real_of(weight_POI);
  int64_t most_rows = 0, scratch = 0;
  const auto task_of = [&](const Job& job) {
    GroupTask task{};
    task.x_rows = rows.data() + job.row;
    task.weight = weight + (job.path * weight_rows + job.out) * num_in * element;
    task.bias = bias ? bias + (job.path * weight_rows + job.out) * element : nullptr;
    task.num_rows = job.num_rows;
    task.num_in = num_in;
    task.num_out = job.num_out;
    task.up = num_out;
    task.type = type;
    task.out_type = out_type;
    task.activation = activation;
    return task;
  };
  for (const Job& job : jobs) {
    most_rows = std::max(most_rows, job.num_rows);
    scratch = std::max(scratch, k.group_scratch_bytes(task_of(job)));
  }
  // 2. Tasks, as threads become free
  const int64_t num_threads = std::clamp<int64_t>(torch::stable::get_num_threads(), 1, (int64_t)jobs.size());
  scratch = (scratch + 127) / 64 * 64;
  const Tensor room = new_empty(weight_POI, {num_threads, scratch}, ScalarType::Byte);
  char* rooms = static_cast<char*>(room.mutable_data_ptr());
  std::vector<void*> targets(num_threads * most_rows);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t thread, int64_t) {
    void** out_rows = targets.data() + thread * most_rows;
    for (int64_t i = next++; i < (int64_t)jobs.size(); i = next++) {
      const Job& job = jobs[i];
      GroupTask task = task_of(job);
      for (int64_t r = 0; r < job.num_rows; ++r) {
        out_rows[r] = out + (job.row + r) * out_stride + job.out * out_element;
      }
      task.out_rows = out_rows;
      k.group_task(task, rooms + thread * scratch);
    }
  });
}

Activation activation_of(const std::string& name, bool allow_swiglu) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "silu") return Activation::kSilu;
  if (allow_swiglu && name == "swiglu") return Activation::kSwiglu;
  BRT_CHECK(false, "activation must be none, relu, gelu, gelu_tanh", allow_swiglu ? ", silu or swiglu" : " or silu",
            ", got ", name);
}

std::vector<int64_t> rising_offsets(const Tensor& offsets, int64_t num_rows) {
  const Tensor offsets_P1 = as_int64(offsets);
  const int64_t* from = offsets_P1.const_data_ptr<int64_t>();
  std::vector<int64_t> values(from, from + offsets_P1.numel());
  for (size_t p = 0; p < values.size(); ++p) {
    BRT_CHECK(values[p] >= (p ? values[p - 1] : 0) && values[p] <= num_rows, "offsets_P1 must rise from 0 to at most ",
              num_rows, ", got ", values[p], " at position ", p);
  }
  return values;
}

Tensor grouped_linear_cpu(const Tensor& x, const Tensor& offsets, const Tensor& weight,
                          const std::optional<Tensor>& bias, std::string activation) {
  // 1. Shapes and values
  BRT_CHECK(x.dim() == 2, "x_RI must be 2-D, got ", shape_of(x));
  check_real(x, "x_RI");
  check_index(offsets, "offsets_P1", 1);
  check_device(offsets, "offsets_P1", x);
  BRT_CHECK(offsets.size(0) >= 1, "offsets_P1 must have at least one entry");
  const Activation act = activation_of(activation, false);
  check_weight(weight, bias, "weight_POI", x, offsets.size(0) - 1, x.size(1));
  const int64_t num_rows = x.size(0), num_out = weight.size(1);
  const Tensor x_RI = as_contiguous(x);
  Tensor out_RO = new_empty(x_RI, {num_rows, num_out}, x.scalar_type());
  if (num_rows == 0 || num_out == 0) return out_RO;

  // 2. Zeros outside the paths
  const std::vector<int64_t> begins = rising_offsets(offsets, num_rows);
  const int64_t element = (int64_t)x.element_size(), out_stride = num_out * element;
  char* out = static_cast<char*>(out_RO.mutable_data_ptr());
  std::fill(out, out + begins.front() * out_stride, 0);
  std::fill(out + begins.back() * out_stride, out + num_rows * out_stride, 0);

  // 3. Rows of paths, by the kernel for the way the weight lies
  if (act == Activation::kNone && !bias.has_value() && is_transposed(weight)) {
    run_products(products_of(begins, x_RI, weight, out), x_RI, kernels());
    return out_RO;
  }
  GroupedLinear g{begins, std::vector<const void*>(num_rows), as_contiguous(weight), std::nullopt, act, out,
                  out_stride, real_of(x)};
  if (bias.has_value()) g.bias_PO = as_contiguous(*bias);
  const char* from = static_cast<const char*>(x_RI.const_data_ptr());
  for (int64_t r = 0; r < num_rows; ++r) g.rows[r] = from + r * x_RI.size(1) * element;
  g.run(kernels());
  return out_RO;
}

STABLE_TORCH_LIBRARY_IMPL(brt_kernels, CPU, m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear_cpu)); }

}  // namespace brt
