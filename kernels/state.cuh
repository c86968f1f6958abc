// Launches over state beside the rows: one strip for each row of each parameter, by the dtypes of the two.
#pragma once

#include <vector>

#include "rows.cuh"
#include "solver.h"
#include "state_kernels.cuh"
#include "state_rows.h"

namespace fastmtl {

/// Plans by the dtype of the state, then by that of the rows, in the order of the rows.
struct StatePlans {
  std::vector<StripPlan> of[4][4];
};

/// Brings every gradient to a dtype that holds its own and its state's, float64 where the parameter is updated in it.
inline StatePlans plan_state(OnDevice const& on, StateRows& both, TensorList const& state) {
  check_device(on, state);
  StatePlans plans;
  for (int64_t t = 0; t < both.rows.num_rows(); ++t) {
    for (int64_t k = 0; k < both.rows.width(); ++k) {
      Row const& state_row = both.state.row(t, k);
      DType dtype = both.type(k) == DType::f64 ? DType::f64 : state_row.dtype;
      if (both.rows.row(t, k).tensor != nullptr) {
        STD_TORCH_CHECK(on.holds(*both.rows.row(t, k).tensor), "rows must be on the device of the state");
        dtype = promote(dtype, both.rows.row(t, k).dtype);
        if (both.rows.row(t, k).dtype != dtype) both.rows.copy(t, k, dtype);
      }
      Row const& row = both.rows.row(t, k);
      plans.of[static_cast<int>(state_row.dtype)][static_cast<int>(dtype)].push_back(
          {{state_row.data, row.tensor != nullptr ? row.data : nullptr},
           both.state.parameter(k).numel,
           static_cast<int32_t>(t)});
    }
  }
  return plans;
}

/// Calls body(state element, row element, plans) for each pair of dtypes there is.
template <class Body>
void for_each_pair(StatePlans const& plans, Body const& body) {
  for (DType const state_dtype : kAllDTypes) {
    for (DType const row_dtype : kAllDTypes) {
      std::vector<StripPlan> const& some = plans.of[static_cast<int>(state_dtype)][static_cast<int>(row_dtype)];
      if (some.empty()) continue;
      with_storage(state_dtype, [&](auto state) {
        using State = decltype(state);
        if (state_dtype == row_dtype) return body(state, state, some);
        // What rows are brought to beside a state of another type is wider than it.
        if (row_dtype == DType::f64) {
          if constexpr (!std::is_same_v<State, double>) body(state, double{}, some);
        } else if constexpr (sizeof(State) == 2) {
          body(state, float{}, some);
        }
      });
    }
  }
}

/// How strips of state are cut; only strips whose two tensors have one type must be alike in phase.
template <class State, class Storage, class Launch>
void launch_state(OnDevice const& on, std::vector<StripPlan> const& plans, Launch const& launch) {
  constexpr int64_t waves = 8;
  Cut const cut{kStatePiece, waves * on.attribute(cudaDevAttrMultiProcessorCount), true};
  plan_launches(plans, std::is_same_v<State, Storage> ? 2 : 1, sizeof(State), cut, launch);
}

}  // namespace fastmtl
