// ema_gram_: moving averages of rows, updated in place on a GPU, and their Gram matrix.
#include <cstdint>
#include <utility>
#include <vector>

#include "ema_gram_tile.cuh"
#include "gram.h"
#include "register.h"
#include "state.cuh"

namespace fastmtl {
namespace {

/// Whether all states and rows are float32 and few enough to be updated and multiplied in one pass.
bool in_one_pass(StateRows const& both) {
  if (both.rows.num_rows() > kEmaTileRows) return false;
  for (int64_t k = 0; k < both.rows.width(); ++k) {
    for (int64_t t = 0; t < both.rows.num_rows(); ++t) {
      Row const& row = both.rows.row(t, k);
      if (both.state.row(t, k).dtype != DType::f32 || (row.tensor != nullptr && row.dtype != DType::f32)) return false;
    }
  }
  return true;
}

using EmaTileKernel = void (*)(LaunchTable, int, double const*, double const*, double*);

/// The kernel for a number of rows, and its blocks of a processor.
std::pair<EmaTileKernel, int64_t> ema_tile(int rows) {
  if (rows <= 2) return {ema_gram_tile_kernel<2>, ema_tile_blocks(2)};
  if (rows <= 3) return {ema_gram_tile_kernel<3>, ema_tile_blocks(3)};
  if (rows <= 4) return {ema_gram_tile_kernel<4>, ema_tile_blocks(4)};
  if (rows <= 6) return {ema_gram_tile_kernel<6>, ema_tile_blocks(6)};
  return {ema_gram_tile_kernel<8>, ema_tile_blocks(8)};
}

/// Updates the states, each read and written once, and returns their Gram matrix.
Tensor update_and_multiply(OnDevice const& on, StateRows const& both, Tensor const& keep, Tensor const& gains) {
  auto const rows = static_cast<int>(both.rows.num_rows());
  std::vector<StripPlan> plans;
  for (int64_t k = 0; k < both.rows.width(); ++k) {
    StripPlan plan{{}, both.state.parameter(k).numel, 0};
    for (int t = 0; t < rows; ++t) plan.pointers.push_back(both.state.row(t, k).data);
    for (int t = 0; t < rows; ++t) plan.pointers.push_back(both.rows.row(t, k).data);
    plans.push_back(std::move(plan));
  }
  Tensor result = on.empty({rows, rows});
  torch::stable::zero_(result);
  auto const [kernel, blocks_of_processor] = ema_tile(rows);
  Cut const cut{kGramPiece, blocks_of_processor * on.attribute(cudaDevAttrMultiProcessorCount), true};
  int64_t const pairs = int64_t{rows} * (rows + 1) / 2;
  plan_launches(plans, 2 * rows, sizeof(float), cut,
                [&](LaunchTable const& table, GroupRuns const& runs, int64_t blocks) {
                  Tensor partial = on.empty({pairs * blocks});
                  auto* const sums = static_cast<double*>(partial.mutable_data_ptr());
                  kernel<<<static_cast<unsigned>(blocks), kGramThreads, 0, on.stream()>>>(
                      table, rows, static_cast<double const*>(keep.const_data_ptr()),
                      static_cast<double const*>(gains.const_data_ptr()), sums);
                  STD_CUDA_KERNEL_LAUNCH_CHECK();
                  reduce_gram(on, runs, rows, blocks, sums, true, result);
                });
  return result;
}

Tensor ema_gram(std::vector<Tensor> const& averages, TensorList const& flat, int64_t num_rows, Tensor const& keep,
                Tensor const& gains) {
  TensorList const state = as_rows(averages);
  OnDevice const on(first_tensor(state));
  StateRows both(state, flat, num_rows);
  Tensor const kept = *dense_vector(on, keep, num_rows, "keep");
  Tensor const gained = *dense_vector(on, gains, num_rows, "gains");
  if (in_one_pass(both)) {
    check_device(on, state);
    check_device(on, flat);
    return update_and_multiply(on, both, kept, gained);
  }
  StatePlans const plans = plan_state(on, both, state);
  for_each_pair(plans, [&](auto state_element, auto row_element, std::vector<StripPlan> const& some) {
    using State = decltype(state_element);
    using Storage = decltype(row_element);
    launch_state<State, Storage>(on, some, [&](LaunchTable const& table, GroupRuns const&, int64_t blocks) {
      ema_kernel<State, Storage><<<static_cast<unsigned>(blocks), kStateThreads, 0, on.stream()>>>(
          table, static_cast<double const*>(kept.const_data_ptr()),
          static_cast<double const*>(gained.const_data_ptr()));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return gram_of_rows(state, num_rows, std::nullopt);
}

FASTMTL_KERNEL(ema_gram_, ema_gram);

}  // namespace
}  // namespace fastmtl
