// How an op on what a step has of T tasks takes its vectors, on every device.
#pragma once

#include <cstdint>
#include <optional>

#include "fastmtl/numbers.h"
#include "solver.h"

namespace fastmtl {

/// The n numbers of a vector, or on the diagonal of a matrix; `kept` holds what had to be converted.
inline Numbers numbers_of(Place const& on, std::optional<Tensor> const& tensor, int64_t n,
                          std::optional<Tensor>& kept) {
  if (!tensor) return {};
  STD_TORCH_CHECK(is_real_float(*tensor) && on.holds(*tensor) && (tensor->dim() == 1 || tensor->dim() == 2) &&
                      tensor->size(0) == n && tensor->size(-1) == n,
                  "vectors must hold a float of each task, on one device");
  ScalarType const type = tensor->scalar_type();
  kept = type == ScalarType::Float || type == ScalarType::Double ? *tensor : dense(on, *tensor);
  return {kept->const_data_ptr(), kept->stride(0) + (kept->dim() == 2 ? kept->stride(1) : 0),
          kept->scalar_type() == ScalarType::Double};
}

inline bool is_plain_float(Tensor const& tensor) {
  return tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double;
}

/// The n numbers of a vector that is written.
inline Vector vector_of(Place const& on, Tensor& tensor, int64_t n) {
  STD_TORCH_CHECK(is_plain_float(tensor) && on.holds(tensor) && tensor.numel() == n && tensor.is_contiguous(),
                  "state must be dense float32 or float64 of each task, on one device");
  return {tensor.mutable_data_ptr(), tensor.scalar_type() == ScalarType::Double};
}

/// The smallest number of a float type whose reciprocal is one.
inline double smallest_of(Tensor const& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? DBL_MIN : double{FLT_MIN};
}

}  // namespace fastmtl
