// The min-norm solver on the CPU: one thread, one call.
#include "fastmtl/min_norm.h"

#include <optional>

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor min_norm_cpu(Tensor gram, std::optional<Tensor> warm_start) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  warm_start = dense_vector(warm_start, n, "warm_start");
  Tensor weights = empty_double({n});
  min_norm(HostTeam{}, n, data_of(gram), data_of(warm_start), mutable_data_of(weights),
           workspace(min_norm_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(min_norm, min_norm_cpu);

}  // namespace
}  // namespace fastmtl
