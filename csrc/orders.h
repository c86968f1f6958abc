// The orders in which gradient surgery visits tasks, on the CPU.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "solver.h"

namespace fastmtl {

/// Checked orders (T, L), dense.
struct Orders {
  Tensor kept;  // Holds the memory where it is not this thread's own.
  int64_t const* data;
  int64_t steps;
};

/// The tasks by rising keys in each row of a (T, T) tensor of floats, equal ones by number and NaN last. The memory is
/// this thread's, until the next call.
inline Orders orders_by_key(Tensor const& keys, int64_t tasks) {
  STD_TORCH_CHECK(keys.is_cpu() && keys.dim() == 2 && keys.size(0) == tasks && keys.size(1) == tasks,
                  "keys of orders must be (T, T)");
  thread_local std::vector<int64_t> memory;
  memory.resize(tasks * tasks);
  Tensor const dense = dense_double(keys);
  double const* row = data_of(dense);
  for (auto index = memory.begin(); index != memory.end(); index += tasks, row += tasks) {
    std::iota(index, index + tasks, 0);
    std::sort(index, index + tasks, [&](int64_t a, int64_t b) {
      if (std::isnan(row[a]) != std::isnan(row[b])) return std::isnan(row[b]);
      return row[a] < row[b] || (!(row[b] < row[a]) && a < b);
    });
  }
  return {dense, memory.data(), tasks};
}

/// A checked (T, L) tensor of task indices, or of (T, T) keys.
inline Orders dense_orders(Tensor const& orders, int64_t tasks) {
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
  return {dense, index, orders.size(1)};
}

}  // namespace fastmtl
