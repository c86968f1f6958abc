// The orders in which gradient surgery visits tasks, on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "solver.h"

namespace fastmtl {

/// The order of the rising keys in each row of a (T, T) tensor of floats, equal ones by task and NaN last.
inline Tensor orders_by_key(Tensor const& keys, int64_t tasks) {
  STD_TORCH_CHECK(keys.is_cpu() && keys.dim() == 2 && keys.size(0) == tasks && keys.size(1) == tasks,
                  "keys of orders must be (T, T)");
  Tensor const dense = dense_double(keys);
  Tensor orders = torch::stable::empty(keys.sizes(), ScalarType::Long);
  auto* index = static_cast<int64_t*>(orders.mutable_data_ptr());
  double const* row = data_of(dense);
  for (int64_t i = 0; i < tasks; ++i, index += tasks, row += tasks) {
    std::iota(index, index + tasks, 0);
    std::stable_sort(index, index + tasks, [&](int64_t a, int64_t b) {
      return row[a] < row[b] || (std::isnan(row[b]) && !std::isnan(row[a]));
    });
  }
  return orders;
}

/// A checked (T, L) tensor of task indices, or of (T, T) keys, as dense int64 indices.
inline Tensor dense_orders(Tensor const& orders, int64_t tasks) {
  if (is_real_float(orders)) return orders_by_key(orders, tasks);
  STD_TORCH_CHECK(
      orders.is_cpu() && orders.scalar_type() == ScalarType::Long && orders.dim() == 2 && orders.size(0) == tasks,
      "orders must be (T, L) int64");
  Tensor dense = orders;
  if (!orders.is_contiguous()) {
    dense = torch::stable::empty(orders.sizes(), ScalarType::Long);
    torch::stable::copy_(dense, orders);
  }
  auto const* const index = static_cast<int64_t const*>(dense.const_data_ptr());
  bool const valid = std::all_of(index, index + dense.numel(), [&](int64_t j) { return j >= 0 && j < tasks; });
  STD_TORCH_CHECK(valid, "orders must hold task indices");
  return dense;
}

inline int64_t const* indices_of(Tensor const& orders) { return static_cast<int64_t const*>(orders.const_data_ptr()); }

}  // namespace fastmtl
