// From the sums of slices to Gram matrices, on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"

namespace fastmtl {

/// Elements of each row that are taken at a time, so that two chunks of all rows stay in the second-level cache.
inline int64_t chunk_length(int64_t num_rows, bool converts) {
  int64_t const cache_floats = converts ? 65536 : 98304;
  return std::clamp<int64_t>(cache_floats / num_rows / 512 * 512, 512, converts ? 2048 : 4096);
}

/// Adds up the upper triangles of all slices, in order: (T, T), or (L, T, T) where there are groups.
inline Tensor gram_of(std::vector<double> const& upper, std::vector<Slice> const& slices, int64_t num_rows,
                      std::optional<int64_t> num_groups) {
  int64_t const pairs = num_rows * (num_rows + 1) / 2;
  std::vector<int64_t> sizes{num_rows, num_rows};
  std::vector<int64_t> strides{num_rows, 1};
  if (num_groups.has_value()) {
    sizes.insert(sizes.begin(), *num_groups);
    strides.insert(strides.begin(), num_rows * num_rows);
  }
  Tensor result = empty_strided(sizes, strides, DType::f64);
  int64_t const count = num_groups.value_or(1);
  auto* matrices = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(matrices, count * num_rows * num_rows, 0.0);
  for (size_t s = 0; s < slices.size(); ++s) {
    double* matrix = matrices + slices[s].group * num_rows * num_rows;
    double const* pair = upper.data() + static_cast<int64_t>(s) * pairs;
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t j = i; j < num_rows; ++j) matrix[i * num_rows + j] += *pair++;
    }
  }
  for (int64_t g = 0; g < count; ++g) {
    double* matrix = matrices + g * num_rows * num_rows;
    for (int64_t i = 0; i < num_rows; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[i * num_rows + j] = matrix[j * num_rows + i];
    }
  }
  return result;
}

}  // namespace fastmtl
