// Where a CUDA kernel runs: the device of a tensor and that device's current stream, reached over the stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "shared_grant.h"

namespace fastmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarpSize = 32;

/// The attributes of shared memory, of kernels and devices.
struct SharedAttributes {
  static size_t static_bytes(void const* kernel) {
    cudaFuncAttributes attributes;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
    return attributes.sharedSizeBytes;
  }

  static size_t most_bytes(int device) {
    int bytes = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return static_cast<size_t>(bytes);
  }

  static void allow(void const* kernel, size_t bytes) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
};

/// Makes a tensor's device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(Tensor const& tensor)
      : device_(tensor.get_device_index()), place_(tensor.device()), guard_(device_) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  bool holds(Tensor const& tensor) const { return tensor.is_cuda() && tensor.get_device_index() == device_; }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  /// An uninitialised tensor on the device.
  Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype = ScalarType::Double) const {
    return torch::stable::empty(sizes, dtype, std::nullopt, place_);
  }

  /// Whether a block of `kernel` gets `bytes` of dynamic shared memory; asks for the leave where it takes one.
  template <class Kernel>
  bool grant_shared(Kernel* kernel, size_t bytes) const {
    static SharedGrants grants;
    return grants.grant(SharedAttributes{}, reinterpret_cast<void const*>(kernel), device_, bytes);
  }

 private:
  int32_t device_;
  torch::stable::Device place_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace fastmtl
