// What the kernels of all T x T solvers share: checks, dense float64 input and, on the CPU, memory to work in.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace fastmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_real_float(Tensor const& tensor) {
  ScalarType const type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

/// A dense float64 tensor of up to three dimensions, uninitialised. torch::stable::empty looks its operator up by name,
/// which takes as long as a small solver.
inline Tensor empty_double(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  std::array<int64_t, 3> strides{1, 1, 1};
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  aoti_torch_dtype_float64(), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  return Tensor(handle);
}

/// The tensor itself where it is dense float64, else a copy that is.
inline Tensor dense_double(Tensor const& tensor) {
  if (tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous()) return tensor;
  Tensor copy = tensor.is_cpu()
                    ? empty_double(tensor.sizes())
                    : torch::stable::empty(tensor.sizes(), ScalarType::Double, std::nullopt, tensor.device());
  torch::stable::copy_(copy, tensor);
  return copy;
}

/// A checked (T, T) Gram matrix as dense float64.
inline Tensor dense_gram(Tensor const& gram) {
  STD_TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.size(0) > 0, "gram must be (T, T)");
  STD_TORCH_CHECK(is_real_float(gram), "gram must be floats");
  return dense_double(gram);
}

/// A checked (T,) vector as dense float64; nothing stays nothing.
inline std::optional<Tensor> dense_vector(std::optional<Tensor> const& vector, int64_t size, char const* name) {
  if (!vector) return std::nullopt;
  STD_TORCH_CHECK(is_real_float(*vector) && vector->is_cpu() && vector->dim() == 1 && vector->size(0) == size, name,
                  " must hold one float per row of gram");
  return dense_double(*vector);
}

inline double const* data_of(Tensor const& tensor) { return static_cast<double const*>(tensor.const_data_ptr()); }
inline double const* data_of(std::optional<Tensor> const& tensor) { return tensor ? data_of(*tensor) : nullptr; }
inline double* mutable_data_of(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

/// Memory for `doubles` numbers that this thread keeps from call to call.
inline double* workspace(int64_t doubles) {
  thread_local std::vector<double> memory;
  if (memory.size() < static_cast<size_t>(doubles)) memory.resize(doubles);
  return memory.data();
}

}  // namespace fastmtl
