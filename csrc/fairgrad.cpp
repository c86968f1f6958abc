// FairGrad's weights on the CPU: one thread, one call.
#include <cfloat>
#include <optional>

#include "fastmtl/fair.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor fairgrad_cpu(Tensor gram, double alpha, std::optional<Tensor> warm_start) {
  STD_TORCH_CHECK(alpha > 0 && alpha <= DBL_MAX, "alpha must be positive and finite");
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  warm_start = dense_vector(warm_start, n, "warm_start");
  Tensor weights = empty_double({n});
  fair(HostTeam{}, n, 1 / alpha, data_of(gram), data_of(warm_start), mutable_data_of(weights),
       workspace(fair_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(fairgrad, fairgrad_cpu);

}  // namespace
}  // namespace fastmtl
