// How a GPU runs a solver's op: one launch, in which a team of lanes takes each problem.
#pragma once

#include "device.cuh"
#include "fastmtl/team.h"

namespace fastmtl {

/// Lanes of the largest team; more would leave too few registers to a lane for all but the simplest solvers.
constexpr int kBlockSize = 256;
constexpr int kSurgeryBlockSize = 1024;

/// Solves in shared memory, or in `spill` where the workspaces of `doubles` numbers do not fit.
template <class Problem>
__global__ void __launch_bounds__(kWarpSize, 1) solve_by_warp(Problem const problem, int64_t doubles, double* spill) {
  extern __shared__ double shared[];
  auto const index = static_cast<int>(blockIdx.x);
  problem.solve(WarpTeam{}, index, spill != nullptr ? spill + index * doubles : shared);
}

template <class Problem, int threads>
__global__ void __launch_bounds__(threads, 1) solve_by_block(Problem const problem, int64_t doubles, double* spill) {
  extern __shared__ double shared[];
  __shared__ Choice scratch[threads / kWarpSize];
  auto const index = static_cast<int>(blockIdx.x);
  problem.solve(BlockTeam{scratch}, index, spill != nullptr ? spill + index * doubles : shared);
}

template <class Problem>
void launch_team(OnDevice const& on, void (*kernel)(Problem, int64_t, double*), Problem const& problem, int threads,
                 int64_t count, int64_t doubles) {
  if (count == 0) return;
  auto bytes = static_cast<size_t>(doubles) * sizeof(double);
  std::optional<Tensor> spill;
  if (!on.grant_shared(kernel, bytes)) {
    spill = on.empty({count * doubles});
    bytes = 0;
  }
  kernel<<<static_cast<unsigned>(count), threads, bytes, on.stream()>>>(
      problem, doubles, spill ? static_cast<double*>(spill->mutable_data_ptr()) : nullptr);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

/// Solves `count` problems of n tasks, each by a warp, or by a block where n is larger than a warp.
template <class Problem>
void launch_solver(OnDevice const& on, Problem const& problem, int n, int64_t doubles, int64_t count = 1) {
  if (n <= kWarpSize) {
    launch_team(on, solve_by_warp<Problem>, problem, kWarpSize, count, doubles);
  } else {
    launch_team(on, solve_by_block<Problem, kBlockSize>, problem, kBlockSize, count, doubles);
  }
}

/// Groups of lanes for surgery: a warp per task, as far as a block reaches.
inline int surgery_groups(OnDevice const&, int n) {
  return n < kSurgeryBlockSize / kWarpSize ? n : kSurgeryBlockSize / kWarpSize;
}

/// Solves `count` problems of gradient surgery, each by a block with a warp per task.
template <class Problem>
void launch_surgery(OnDevice const& on, Problem const& problem, int n, int64_t doubles, int64_t count = 1) {
  launch_team(on, solve_by_block<Problem, kSurgeryBlockSize>, problem, kWarpSize * surgery_groups(on, n), count,
              doubles);
}

}  // namespace fastmtl
