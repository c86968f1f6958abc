// The min-norm solver on a GPU: one launch of one warp, or of one block where the matrix is larger than a warp.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "fastmtl/min_norm.h"
#include "register.h"

namespace fastmtl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int warp_size = 32;
constexpr int block_size = 256;
constexpr int default_shared_bytes = 48 * 1024;

/// Solves in shared memory, or in `spill` where the workspace does not fit.
__global__ void __launch_bounds__(warp_size, 1)
    min_norm_warp_kernel(int n, double const* gram, double const* warm, double* weights, double* spill) {
  extern __shared__ double shared[];
  min_norm(WarpTeam{}, n, gram, warm, weights, spill != nullptr ? spill : shared);
}

__global__ void __launch_bounds__(block_size, 1)
    min_norm_block_kernel(int n, double const* gram, double const* warm, double* weights, double* spill) {
  extern __shared__ double shared[];
  __shared__ Choice scratch[block_size / warp_size];
  min_norm(BlockTeam{scratch}, n, gram, warm, weights, spill != nullptr ? spill : shared);
}

/// An uninitialised float64 tensor beside another one.
Tensor empty_double(torch::headeronly::IntHeaderOnlyArrayRef sizes, Tensor const& beside) {
  return torch::stable::empty(sizes, ScalarType::Double, std::nullopt, beside.device());
}

bool is_real_float(Tensor const& tensor) {
  ScalarType const type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

/// The tensor itself where it is dense float64, else a copy that is.
Tensor dense_double(Tensor const& tensor) {
  if (tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous()) return tensor;
  Tensor copy = empty_double(tensor.sizes(), tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor min_norm_cuda(Tensor gram, std::optional<Tensor> warm_start) {
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) > 0, "gram must be (T, T)");
  STD_TORCH_CHECK(is_real_float(gram) && (!warm_start || is_real_float(*warm_start)),
                  "gram, warm_start must be floats");
  int const n = static_cast<int>(gram.size(0));
  int32_t const device = gram.get_device_index();
  STD_TORCH_CHECK(!warm_start || (warm_start->is_cuda() && warm_start->get_device_index() == device &&
                                  warm_start->dim() == 1 && warm_start->size(0) == n),
                  "warm_start must be (T,) on gram's device");
  torch::stable::accelerator::DeviceGuard const guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  gram = dense_double(gram);
  if (warm_start) warm_start = dense_double(*warm_start);
  Tensor weights = empty_double({n}, gram);

  auto const kernel = n <= warp_size ? min_norm_warp_kernel : min_norm_block_kernel;
  int64_t const doubles = min_norm_workspace(n);
  auto const bytes = static_cast<size_t>(doubles) * sizeof(double);
  size_t dynamic_bytes = bytes;
  std::optional<Tensor> spill;
  if (bytes > default_shared_bytes) {
    int most = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    cudaFuncAttributes attributes;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    if (bytes + attributes.sharedSizeBytes <= static_cast<size_t>(most)) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    } else {
      spill = empty_double({doubles}, gram);
      dynamic_bytes = 0;
    }
  }
  kernel<<<1, n <= warp_size ? warp_size : block_size, dynamic_bytes, static_cast<cudaStream_t>(stream)>>>(
      n, static_cast<double const*>(gram.const_data_ptr()),
      warm_start ? static_cast<double const*>(warm_start->const_data_ptr()) : nullptr,
      static_cast<double*>(weights.mutable_data_ptr()),
      spill ? static_cast<double*>(spill->mutable_data_ptr()) : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return weights;
}

FASTMTL_CUDA_KERNEL(min_norm, min_norm_cuda);

}  // namespace
}  // namespace fastmtl
