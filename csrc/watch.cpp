// watch_: what a training step must not go on with, on every device.
#include "fastmtl/watch.h"

#include <optional>

#include "numbers.h"
#include "register.h"

namespace fastmtl {
namespace {

struct Watch {
  int n;
  StepNumbers step;
  float* found_inf;
  int64_t* steps;
  double* first_bad;

  FASTMTL_TEAM_TEMPLATE FASTMTL_HD void solve(Team const& team, int, double*) const {
    watch(team, n, step, found_inf, steps, first_bad);
  }
};

void watch_op(Tensor found_inf, Tensor steps, Tensor first_bad, Tensor losses, std::optional<Tensor> gram,
              std::optional<Tensor> weights, std::optional<Tensor> refused) {
  Place const on(losses);
  STD_TORCH_CHECK(losses.dim() == 1, "losses must be (T,)");
  int64_t const n = losses.size(0);
  STD_TORCH_CHECK(on.holds(found_inf) && found_inf.scalar_type() == ScalarType::Float && found_inf.numel() == 1,
                  "found_inf must be one float32");
  STD_TORCH_CHECK(
      on.holds(steps) && steps.scalar_type() == ScalarType::Long && steps.numel() == 2 && steps.is_contiguous(),
      "steps must be two int64");
  STD_TORCH_CHECK(on.holds(first_bad) && first_bad.scalar_type() == ScalarType::Double && first_bad.numel() == 5 * n &&
                      first_bad.is_contiguous(),
                  "first_bad must be (5, T) float64");
  STD_TORCH_CHECK(!refused || (on.holds(*refused) && refused->scalar_type() == ScalarType::Bool &&
                               refused->numel() == n && refused->is_contiguous()),
                  "refused must be (T,) booleans");
  std::optional<Tensor> kept[3];
  StepNumbers const step{numbers_of(on, losses, n, kept[0]), numbers_of(on, gram, n, kept[1]),
                         numbers_of(on, weights, n, kept[2]),
                         refused ? static_cast<bool const*>(refused->const_data_ptr()) : nullptr};
  launch_solver(
      on,
      Watch{static_cast<int>(n), step, static_cast<float*>(found_inf.mutable_data_ptr()),
            static_cast<int64_t*>(steps.mutable_data_ptr()), static_cast<double*>(first_bad.mutable_data_ptr())},
      static_cast<int>(n), 0);
}

FASTMTL_KERNEL(watch_, watch_op);

}  // namespace
}  // namespace fastmtl
