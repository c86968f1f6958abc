// moco_rates_ and moco_step_, on every device.
#include "fastmtl/moco.h"

#include <optional>

#include "numbers.h"
#include "register.h"

namespace fastmtl {
namespace {

struct MocoRates {
  int n;
  Vector steps;
  Numbers losses;
  Numbers squares;
  double beta;
  double sigma;
  double* rates;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double*) const {
    moco_rates(team, n, steps, losses, squares, beta, sigma, rates, rates + n);
  }
};

struct MocoStep {
  int n;
  Vector weights;
  double const* products;
  Vector steps;
  double gamma;
  double sigma;
  double rho;
  Vector copy;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double* memory) const {
    moco_step(team, n, weights, products, steps, gamma, sigma, rho, copy, memory);
  }
};

Tensor rates_op(Tensor steps, Tensor losses, Tensor gram, double beta, double sigma) {
  Place const on(losses);
  int64_t const n = losses.numel();
  std::optional<Tensor> kept[2];
  Tensor rates = on.empty({2, n});
  launch_solver(on,
                MocoRates{static_cast<int>(n), vector_of(on, steps, 1), numbers_of(on, losses, n, kept[0]),
                          numbers_of(on, gram, n, kept[1]), beta, sigma, mutable_data_of(rates)},
                static_cast<int>(n), 0);
  return rates;
}

Tensor step_op(Tensor weights, Tensor products, Tensor steps, double gamma, double sigma, double rho) {
  Gram const gram(products);
  STD_TORCH_CHECK(is_plain_float(weights), "weights must be float32 or float64");
  Tensor copy = gram.on.empty({gram.n});
  launch_solver(gram.on,
                MocoStep{gram.n, vector_of(gram.on, weights, gram.n), gram.data(), vector_of(gram.on, steps, 1), gamma,
                         sigma, rho, vector_of(gram.on, copy, gram.n)},
                gram.n, moco_workspace(gram.n));
  return copy;
}

FASTMTL_KERNEL(moco_rates_, rates_op);
FASTMTL_KERNEL(moco_step_, step_op);

}  // namespace
}  // namespace fastmtl
