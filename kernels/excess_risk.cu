// excess_risk_: sums of squared gradients, updated in place, and each task's risk by them, in one pass on a GPU.
#include <cstdint>
#include <vector>

#include "register.h"
#include "state.cuh"

namespace fastmtl {
namespace {

constexpr int kRiskReduceThreads = 256;

/// risks += the sums of each row's blocks, which are Gram matrices of one row to it.
__global__ void __launch_bounds__(kRiskReduceThreads)
    risk_reduce_kernel(__grid_constant__ GroupRuns const runs, int64_t blocks, double const* partial, double* risks) {
  gram_reduce(runs, 1, blocks, partial, true, risks);
}

Tensor excess_risk(std::vector<Tensor> const& sums, TensorList const& flat, int64_t num_rows, double epsilon) {
  STD_TORCH_CHECK(epsilon > 0, "epsilon must be above 0");
  TensorList const state = as_rows(sums);
  OnDevice const on(first_tensor(state));
  StateRows both(state, flat, num_rows);
  StatePlans const plans = plan_state(on, both, state);
  Tensor risks = on.empty({num_rows});
  torch::stable::zero_(risks);
  for_each_pair(plans, [&](auto state_element, auto row_element, std::vector<StripPlan> const& all) {
    using State = decltype(state_element);
    using Storage = decltype(row_element);
    std::vector<StripPlan> some;
    for (StripPlan const& plan : all) {
      if (plan.pointers[1] != nullptr) some.push_back(plan);
    }
    launch_state<State, Storage>(on, some, [&](LaunchTable const& table, GroupRuns const& runs, int64_t blocks) {
      Tensor partial = on.empty({blocks});
      auto* const of_blocks = static_cast<double*>(partial.mutable_data_ptr());
      excess_risk_kernel<State, Storage>
          <<<static_cast<unsigned>(blocks), kStateThreads, 0, on.stream()>>>(table, epsilon, of_blocks);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      constexpr int warps_per_block = kRiskReduceThreads / kWarpSize;
      risk_reduce_kernel<<<static_cast<unsigned>((runs.count + warps_per_block - 1) / warps_per_block),
                           kRiskReduceThreads, 0, on.stream()>>>(runs, blocks, of_blocks,
                                                                 static_cast<double*>(risks.mutable_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return risks;
}

FASTMTL_KERNEL(excess_risk_, excess_risk);

}  // namespace
}  // namespace fastmtl
