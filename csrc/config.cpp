// ConFIG's weights on the CPU: one thread, one call.
#include "fastmtl/config.h"

#include "register.h"
#include "solver.h"

namespace fastmtl {
namespace {

Tensor config_cpu(Tensor gram) {
  gram = dense_gram(gram);
  int const n = static_cast<int>(gram.size(0));
  Tensor weights = empty_double({n});
  config(HostTeam{}, n, data_of(gram), mutable_data_of(weights), workspace(config_workspace(n)));
  return weights;
}

FASTMTL_CPU_KERNEL(config, config_cpu);

}  // namespace
}  // namespace fastmtl
