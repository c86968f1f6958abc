// The min-norm solver on the CPU: one thread, one call.
#include "fastmtl/min_norm.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "register.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool is_real_float(Tensor const& tensor) {
  ScalarType const type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

/// The tensor itself where it is dense float64, else a copy that is.
Tensor dense_double(Tensor const& tensor) {
  if (tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous()) return tensor;
  Tensor copy = torch::stable::empty(tensor.sizes(), ScalarType::Double);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor min_norm_cpu(Tensor gram, std::optional<Tensor> warm_start) {
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) > 0, "gram must be (T, T)");
  STD_TORCH_CHECK(is_real_float(gram) && (!warm_start || is_real_float(*warm_start)),
                  "gram, warm_start must be floats");
  int const n = static_cast<int>(gram.size(0));
  STD_TORCH_CHECK(!warm_start || (warm_start->is_cpu() && warm_start->dim() == 1 && warm_start->size(0) == n),
                  "warm_start must be (T,)");
  gram = dense_double(gram);
  if (warm_start) warm_start = dense_double(*warm_start);
  Tensor weights = torch::stable::empty({n}, ScalarType::Double);

  thread_local std::vector<double> workspace;
  if (auto const needed = static_cast<size_t>(min_norm_workspace(n)); workspace.size() < needed) {
    workspace.resize(needed);
  }
  double const* const warm = warm_start ? static_cast<double const*>(warm_start->const_data_ptr()) : nullptr;
  min_norm(HostTeam{}, n, static_cast<double const*>(gram.const_data_ptr()), warm,
           static_cast<double*>(weights.mutable_data_ptr()), workspace.data());
  return weights;
}

FASTMTL_CPU_KERNEL(min_norm, min_norm_cpu);

}  // namespace
}  // namespace fastmtl
