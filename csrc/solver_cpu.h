// Where and how the CPU runs a solver's op: on one thread, problem after problem, or many of them on all threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <vector>

#include "fastmtl/parallel.h"
#include "fastmtl/team.h"

namespace fastmtl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// The CPU as the place of an op.
class OnCpu {
 public:
  explicit OnCpu(Tensor const&) {}

  static bool holds(Tensor const& tensor) { return tensor.is_cpu(); }

  /// A dense tensor of up to three dimensions, float64 or int64, uninitialised. torch::stable::empty looks its operator
  /// up by name, which takes as long as a small solver.
  static Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype = ScalarType::Double) {
    std::array<int64_t, 3> strides{1, 1, 1};
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype == ScalarType::Long ? aoti_torch_dtype_int64() : aoti_torch_dtype_float64(),
                                 aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
};

/// Memory for `doubles` numbers that this thread keeps from call to call.
inline double* workspace(int64_t doubles) {
  thread_local std::vector<double> memory;
  if (memory.size() < static_cast<size_t>(doubles)) memory.resize(doubles);
  return memory.data();
}

/// Solves `count` problems, one after the other.
template <class Problem>
void launch_solver(OnCpu const&, Problem const& problem, int /*n*/, int64_t doubles, int64_t count = 1) {
  double* const memory = workspace(doubles);
  for (int64_t index = 0; index < count; ++index) problem.solve(HostTeam{}, static_cast<int>(index), memory);
}

/// Groups of lanes that share one problem of gradient surgery.
inline int surgery_groups(OnCpu const&, int /*n*/) { return HostTeam::groups(); }

/// Work, about one per nanosecond, below which waking threads costs more than it saves.
constexpr int64_t kParallelWork = 200000;

/// Solves `count` problems of gradient surgery, many or large ones on all threads.
template <class Problem>
void launch_surgery(OnCpu const&, Problem const& problem, int n, int64_t doubles, int64_t count = 1) {
  double* const memory = workspace(count * doubles);
  auto const solve = [&](int64_t index) {
    problem.solve(HostTeam{}, static_cast<int>(index), memory + index * doubles);
  };
  if (count * n * problem.steps * (20 + n / 2) < kParallelWork) {
    for (int64_t index = 0; index < count; ++index) solve(index);
  } else {
    run_parallel(count, solve);
  }
}

}  // namespace fastmtl
