// Projections onto the dual cone of the gradients on the CPU: one thread, the targets one after the other.
#include "fastmtl/dual_cone.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor dual_cone_cpu(Tensor gram, Tensor targets) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  int64_t const dims = targets.dim();
  STD_TORCH_CHECK(is_real_float(targets) && targets.is_cpu() && (dims == 1 || dims == 2) && targets.size(dims - 1) == n,
                  "targets must hold one float per row of gram");
  targets = dense_double(targets);
  Tensor weights = empty_double(targets.sizes());
  int64_t const count = targets.numel() / n;
  for (int64_t k = 0; k < count; ++k) {
    dual_cone(HostTeam{}, n, data_of(gram), data_of(targets) + k * n, mutable_data_of(weights) + k * n,
              workspace(dual_cone_workspace(n)));
  }
  return weights;
}

FASTMTL_CPU_KERNEL(dual_cone, dual_cone_cpu);

}  // namespace
}  // namespace fastmtl
