// Orders of tasks on the CPU, sorted and checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "solver_cpu.h"

namespace fastmtl {

/// The tasks by rising keys in each row of dense (n, n) float64 keys, equal ones by number and NaN last. The memory is
/// this thread's, until the next call.
inline int64_t const* sorted_tasks(OnCpu const&, double const* row, int n, Tensor* /*memory*/) {
  thread_local std::vector<int64_t> memory;
  memory.resize(int64_t{n} * n);
  for (auto index = memory.begin(); index != memory.end(); index += n, row += n) {
    std::iota(index, index + n, 0);
    std::sort(index, index + n, [&](int64_t a, int64_t b) {
      if (std::isnan(row[a]) != std::isnan(row[b])) return std::isnan(row[b]);
      return row[a] < row[b] || (!(row[b] < row[a]) && a < b);
    });
  }
  return memory.data();
}

/// Refuses what is no task.
inline void check_tasks(OnCpu const&, int64_t const* tasks, int64_t count, int n) {
  bool const valid = std::all_of(tasks, tasks + count, [&](int64_t j) { return j >= 0 && j < n; });
  STD_TORCH_CHECK(valid, "orders must hold task indices");
}

}  // namespace fastmtl
