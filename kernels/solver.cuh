// What all T x T solvers share on a GPU: one launch, in which a team of lanes takes each problem.
//
// A problem is a struct with `template <class Team> __device__ void solve(Team const& team, int index, double* memory)
// const`, which calls a solver of csrc/include/fastmtl/ on problem number `index`.
#pragma once

#include "device.cuh"
#include "fastmtl/team.h"
#include "solver.h"

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
inline int surgery_groups(int n) { return n < kSurgeryBlockSize / kWarpSize ? n : kSurgeryBlockSize / kWarpSize; }

/// Solves `count` problems of gradient surgery, each by a block with a warp per task.
template <class Problem>
void launch_surgery(OnDevice const& on, Problem const& problem, int n, int64_t doubles, int64_t count = 1) {
  launch_team(on, solve_by_block<Problem, kSurgeryBlockSize>, problem, kWarpSize * surgery_groups(n), count, doubles);
}

/// A checked (T,) vector as dense float64; nothing stays nothing.
inline std::optional<Tensor> dense_vector(OnDevice const& on, std::optional<Tensor> const& vector, int n,
                                          char const* name) {
  if (!vector) return std::nullopt;
  STD_TORCH_CHECK(is_real_float(*vector) && on.holds(*vector) && vector->dim() == 1 && vector->size(0) == n, name,
                  " must hold one float per row of gram, on its device");
  return dense_double(*vector);
}

/// The weights of a solver that takes a Gram matrix and nothing else: `Problem` is {n, gram, weights}.
template <class Problem>
Tensor solve_gram(Tensor gram, int64_t (*workspace_of)(int)) {
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor weights = on.empty({n});
  launch_solver(on, Problem{n, data_of(gram), mutable_data_of(weights)}, n, workspace_of(n));
  return weights;
}

}  // namespace fastmtl
