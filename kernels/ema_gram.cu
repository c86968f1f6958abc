// ema_gram_: moving averages of rows, updated in place on a GPU, and their Gram matrix.
#include <cstdint>
#include <vector>

#include "gram.h"
#include "register.h"
#include "state.cuh"

namespace fastmtl {
namespace {

Tensor ema_gram(std::vector<Tensor> const& averages, TensorList const& flat, int64_t num_rows, Tensor const& keep,
                Tensor const& gains) {
  TensorList const state = as_rows(averages);
  OnDevice const on(first_tensor(state));
  StateRows both(state, flat, num_rows);
  StatePlans const plans = plan_state(on, both, state);
  Tensor const kept = factors_of(on, keep, num_rows, "keep");
  Tensor const gained = factors_of(on, gains, num_rows, "gains");
  for_each_pair(plans, [&](auto own, auto row, std::vector<StripPlan> const& some) {
    using State = decltype(own);
    using Storage = decltype(row);
    launch_state<State, Storage>(on, some, [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
      ema_kernel<State, Storage><<<static_cast<unsigned>(blocks), kStateThreads, 0, on.stream()>>>(
          table, static_cast<double const*>(kept.const_data_ptr()),
          static_cast<double const*>(gained.const_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return gram_of_rows(state, num_rows, std::nullopt);
}

FASTMTL_CUDA_KERNEL(ema_gram_, ema_gram);

}  // namespace
}  // namespace fastmtl
