// Orders of tasks on a GPU.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"

namespace fastmtl {

/// Row blockIdx.x of `orders` <- the tasks by rising keys, equal ones by number and NaN last: each lane counts what
/// comes before its task.
static __global__ void __launch_bounds__(128) sort_by_key(int n, double const* keys, int64_t* orders) {
  double const* const row = keys + int64_t{blockIdx.x} * n;
  for (int j = static_cast<int>(threadIdx.x); j < n; j += static_cast<int>(blockDim.x)) {
    double const key = row[j];
    int place = 0;
    for (int k = 0; k < n; ++k) {
      double const other = row[k];
      bool const alike = other == key || (isnan(other) && isnan(key));
      place += alike ? k < j : (other < key || (isnan(key) && !isnan(other)));
    }
    orders[int64_t{blockIdx.x} * n + place] = j;
  }
}

/// The tasks by rising keys in each row of dense (n, n) float64 keys, equal ones by number and NaN last, in new
/// `memory`.
inline int64_t const* sorted_tasks(OnDevice const& on, double const* keys, int n, Tensor* memory) {
  *memory = on.empty({n, n}, ScalarType::Long);
  auto* const tasks = static_cast<int64_t*>(memory->mutable_data_ptr());
  sort_by_key<<<n, 128, 0, on.stream()>>>(n, keys, tasks);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return tasks;
}

/// Does nothing: to look would be to wait for the device. The solver passes over what is no task.
inline void check_tasks(OnDevice const&, int64_t const*, int64_t, int) {}

}  // namespace fastmtl
