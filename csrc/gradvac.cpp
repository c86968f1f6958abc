// Gradient Vaccine's weights on the CPU. Groups of parameters are independent; many or large ones are shared out among
// threads.
#include "fastmtl/gradvac.h"

#include <tuple>

#include "fastmtl/parallel.h"
#include "orders.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

/// Work, about one per nanosecond, below which waking threads costs more than it saves.
constexpr int64_t kParallelWork = 200000;

std::tuple<Tensor, Tensor> gradvac_cpu(Tensor gram, Tensor orders, Tensor rho, double beta) {
  int64_t const dims = gram.dim();
  bool const single = dims == 2;
  STD_TORCH_CHECK(
      (single || dims == 3) && gram.size(dims - 1) == gram.size(dims - 2) && gram.numel() > 0 && is_real_float(gram),
      "gram must be (T, T) or (L, T, T) floats");
  STD_TORCH_CHECK(rho.is_cpu() && is_real_float(rho) && rho.sizes().equals(gram.sizes()),
                  "rho must hold one float per entry of gram");
  STD_TORCH_CHECK(beta >= 0 && beta <= 1, "beta must be in [0, 1]");
  gram = dense_double(gram);
  int const n = static_cast<int>(gram.size(dims - 1));
  Orders const visits = dense_orders(orders, n);
  int64_t const steps = visits.steps;
  int64_t const groups = single ? 1 : gram.size(0);
  int64_t const entries = int64_t{n} * n;

  Tensor new_rho = empty_double(gram.sizes());
  torch::stable::copy_(new_rho, rho);
  Tensor weights = single ? empty_double({n}) : empty_double({groups, n});
  int64_t const doubles = gradvac_workspace(n, HostTeam::groups());
  double* const memory = workspace(groups * doubles);
  double const* const gram_data = data_of(gram);
  int64_t const* const index = visits.data;
  double* const rho_data = mutable_data_of(new_rho);
  double* const weight_data = mutable_data_of(weights);
  auto solve = [&](int64_t group) {
    gradvac(HostTeam{}, n, steps, gram_data + group * entries, index, beta, rho_data + group * entries,
            weight_data + group * n, memory + group * doubles);
  };
  if (groups * n * steps * (20 + n / 2) < kParallelWork) {
    for (int64_t group = 0; group < groups; ++group) solve(group);
  } else {
    run_parallel(groups, solve);
  }
  return {weights, new_rho};
}

FASTMTL_CPU_KERNEL(gradvac, gradvac_cpu);

}  // namespace
}  // namespace fastmtl
