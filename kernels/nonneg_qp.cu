// Nonnegative quadratic programs on a GPU: one launch of one warp, or of one block where the matrix is larger than a
// warp.
#include "fastmtl/nonneg_qp.h"
#include "register.h"
#include "solver.cuh"

namespace fastmtl {
namespace {

struct Program {
  int n;
  double const* gram;
  double const* linear;
  double* solution;

  template <class Team>
  __device__ void solve(Team const& team, int, double* memory) const {
    nonneg_qp(team, n, gram, linear, solution, memory);
  }
};

Tensor nonneg_qp_cuda(Tensor gram, Tensor linear) {
  OnDevice const on(gram);
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  STD_TORCH_CHECK(is_real_float(linear) && on.holds(linear) && linear.dim() == 1 && linear.size(0) == n,
                  "linear must hold one float per row of gram, on its device");
  linear = dense_double(linear);
  Tensor solution = on.empty({n});
  launch_solver(on, Program{n, data_of(gram), data_of(linear), mutable_data_of(solution)}, n, nonneg_qp_workspace(n),
                1);
  return solution;
}

FASTMTL_CUDA_KERNEL(nonneg_qp, nonneg_qp_cuda);

}  // namespace
}  // namespace fastmtl
