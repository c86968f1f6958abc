// The orders in which gradient surgery visits tasks, on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

#include "solver.h"

namespace fastmtl {

/// A checked (T, L) tensor of task indices as dense int64.
inline Tensor dense_orders(Tensor const& orders, int64_t tasks) {
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
