// famo_weights and famo_step_, on every device.
#include "fastmtl/famo.h"

#include <optional>

#include "numbers.h"
#include "register.h"

namespace fastmtl {
namespace {

struct FamoWeights {
  int n;
  Numbers logits;
  Numbers losses;
  Numbers least;
  double smallest;
  Vector weights;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double*) const {
    famo_weights(team, n, logits, losses, least, smallest, weights);
  }
};

struct FamoStep {
  int n;
  FamoState state;
  Numbers before;
  Numbers after;
  Numbers least;
  double smallest;
  double lr;
  double decay;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double*) const {
    famo_step(team, n, state, before, after, least, smallest, lr, decay);
  }
};

Tensor weights_op(Tensor logits, Tensor losses, Tensor least) {
  Place const on(losses);
  int64_t const n = losses.numel();
  std::optional<Tensor> kept[3];
  Tensor weights = on.empty({n});
  launch_solver(on,
                FamoWeights{static_cast<int>(n), numbers_of(on, logits, n, kept[0]), numbers_of(on, losses, n, kept[1]),
                            numbers_of(on, least, n, kept[2]), smallest_of(losses), vector_of(on, weights, n)},
                static_cast<int>(n), 0);
  return weights;
}

void step_op(Tensor logits, Tensor first, Tensor second, Tensor steps, Tensor before, Tensor after, Tensor least,
             double lr, double decay) {
  Place const on(logits);
  int64_t const n = logits.numel();
  std::optional<Tensor> kept[3];
  FamoState const state{vector_of(on, logits, n), vector_of(on, first, n), vector_of(on, second, n),
                        vector_of(on, steps, 1)};
  launch_solver(
      on,
      FamoStep{static_cast<int>(n), state, numbers_of(on, before, n, kept[0]), numbers_of(on, after, n, kept[1]),
               numbers_of(on, least, n, kept[2]), smallest_of(before), lr, decay},
      static_cast<int>(n), 0);
}

FASTMTL_KERNEL(famo_weights, weights_op);
FASTMTL_KERNEL(famo_step_, step_op);

}  // namespace
}  // namespace fastmtl
