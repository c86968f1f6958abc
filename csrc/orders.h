// The orders in which gradient surgery visits tasks.
#pragma once

#include <cstdint>

#include "solver.h"

#if defined(__CUDACC__)
#include "orders.cuh"
#else
#include "orders_cpu.h"
#endif

namespace fastmtl {

/// Orders (T, L), dense.
struct Orders {
  Tensor memory;  // Theirs, where it is not the thread's.
  int64_t const* data;
  int64_t steps;  // L
};

/// Checked orders: those of a tensor of tasks, or the tasks by rising (T, T) keys.
inline Orders dense_orders(Place const& on, Tensor const& orders, int n) {
  STD_TORCH_CHECK(on.holds(orders) && orders.dim() == 2 && orders.size(0) == n,
                  "orders must have one row per task, on gram's device");
  if (is_real_float(orders)) {
    STD_TORCH_CHECK(orders.size(1) == n, "keys of orders must be (T, T)");
    Tensor const keys = dense(on, orders);
    Tensor memory = keys;
    int64_t const* const data = sorted_tasks(on, data_of(keys), n, &memory);
    return {memory, data, n};
  }
  STD_TORCH_CHECK(orders.scalar_type() == ScalarType::Long, "orders must be (T, L) int64");
  Tensor const tasks = dense(on, orders, ScalarType::Long);
  auto const* const data = static_cast<int64_t const*>(tasks.const_data_ptr());
  check_tasks(on, data, tasks.numel(), n);
  return {tasks, data, orders.size(1)};
}

}  // namespace fastmtl
