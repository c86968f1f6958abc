// Nash-MTL's weights on the CPU: one thread, one call.
#include <optional>

#include "fastmtl/fair.h"
#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor nash_cpu(Tensor gram, std::optional<Tensor> warm_start) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  warm_start = dense_vector(warm_start, n, "warm_start");
  Tensor weights = empty_double({n});
  fair(HostTeam{}, n, 1.0, data_of(gram), data_of(warm_start), mutable_data_of(weights), workspace(fair_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(nash, nash_cpu);

}  // namespace
}  // namespace fastmtl
