// Small tensors of numbers - weights, scales - read on the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <vector>

#include "fastmtl/row_table.h"

namespace fastmtl {

template <class Scalar>
std::vector<double> gather(Tensor const& matrix, Shape const& shape) {
  auto const* values = static_cast<Scalar const*>(matrix.const_data_ptr());
  bool const many = shape.dim == 2;
  int64_t const height = many ? shape.sizes[0] : 1;
  int64_t const down = many ? shape.strides[0] : 0;
  std::vector<double> gathered;
  gathered.reserve(shape.numel());
  for (int64_t i = 0; i < height; ++i) {
    for (int64_t j = 0; j < shape.sizes[many]; ++j) gathered.push_back(values[i * down + j * shape.strides[many]]);
  }
  return gathered;
}

/// A one- or two-dimensional tensor of any float type in float64, row by row.
inline std::vector<double> read_numbers(Tensor const& numbers) {
  Shape const shape(numbers);
  switch (dtype_of(numbers)) {
    case DType::f64:
      return gather<double>(numbers, shape);
    case DType::f32:
      return gather<float>(numbers, shape);
    case DType::bf16:
      return gather<c10::BFloat16>(numbers, shape);
    default:
      return gather<c10::Half>(numbers, shape);
  }
}

/// One number for each row.
inline std::vector<double> read_vector(Tensor const& numbers, int64_t num_rows, char const* name) {
  Shape const shape(numbers);
  STD_TORCH_CHECK(shape.dim == 1 && shape.sizes[0] == num_rows, name, " must hold one number for each row");
  return read_numbers(numbers);
}

}  // namespace fastmtl
