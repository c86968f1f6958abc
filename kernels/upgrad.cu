// UPGrad's weights on a GPU: a warp or a block projects each gradient, all at once, and a second launch adds them up.
#include "fastmtl/upgrad.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

struct Projection {
  int n;
  double norm_eps;
  double reg_eps;
  double const* gram;
  double* projected;  // (T, T)

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int task, double* memory) const {
    upgrad_matrix(team, n, norm_eps, reg_eps, gram, memory);
    upgrad_project(team, n, task, memory, projected + int64_t{task} * n, memory + int64_t{n} * n);
  }
};

__global__ void __launch_bounds__(128) add_rows(int n, double const* rows, double* sums) {
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    double sum = 0;
    for (int t = 0; t < n; ++t) sum += rows[int64_t{t} * n + i];
    sums[i] = sum;
  }
}

Tensor upgrad_op(Tensor matrix, double norm_eps, double reg_eps) {
  STD_TORCH_CHECK(norm_eps >= 0 && reg_eps >= 0, "norm_eps and reg_eps must be at least 0");
  Gram const gram(matrix);
  int const n = gram.n;
  Tensor projected = gram.on.empty({n, n});
  Tensor weights = gram.on.empty({n});
  launch_solver(gram.on, Projection{n, norm_eps, reg_eps, gram.data(), mutable_data_of(projected)}, n,
                int64_t{n} * n + upgrad_project_workspace(n), n);
  add_rows<<<1, 128, 0, gram.on.stream()>>>(n, data_of(projected), mutable_data_of(weights));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return weights;
}

FASTMTL_KERNEL(upgrad, upgrad_op);

}  // namespace
}  // namespace fastmtl
