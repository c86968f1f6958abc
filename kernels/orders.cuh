// The orders in which gradient surgery visits tasks, on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"
#include "solver.h"

namespace fastmtl {

/// Row blockIdx.x of `orders` <- the tasks by rising keys, equal ones by number and NaN last: each lane counts what
/// comes before its task.
static __global__ void __launch_bounds__(128) sort_by_key(int n, double const* keys, int64_t* orders) {
  double const* const row = keys + int64_t{blockIdx.x} * n;
  for (int j = static_cast<int>(threadIdx.x); j < n; j += static_cast<int>(blockDim.x)) {
    double const own = row[j];
    int place = 0;
    for (int k = 0; k < n; ++k) {
      double const other = row[k];
      bool const alike = other == own || (isnan(other) && isnan(own));
      place += alike ? k < j : (other < own || (isnan(own) && !isnan(other)));
    }
    orders[int64_t{blockIdx.x} * n + place] = j;
  }
}

/// A checked (T, L) tensor of tasks, or the orders of (T, T) keys; dense. What is no task is left to the solver, which
/// passes it over: to look here would be to wait for the device.
inline Tensor dense_orders(OnDevice const& on, Tensor const& orders, int n) {
  STD_TORCH_CHECK(on.holds(orders) && orders.dim() == 2 && orders.size(0) == n,
                  "orders must have one row per task, on gram's device");
  if (is_real_float(orders)) {
    STD_TORCH_CHECK(orders.size(1) == n, "keys of orders must be (T, T)");
    Tensor const keys = dense_double(orders);
    Tensor sorted = on.empty({n, n}, ScalarType::Long);
    sort_by_key<<<n, 128, 0, on.stream()>>>(n, data_of(keys), static_cast<int64_t*>(sorted.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return sorted;
  }
  STD_TORCH_CHECK(orders.scalar_type() == ScalarType::Long, "orders must be (T, L) int64");
  if (orders.is_contiguous()) return orders;
  Tensor dense = on.empty(orders.sizes(), ScalarType::Long);
  torch::stable::copy_(dense, orders);
  return dense;
}

}  // namespace fastmtl
