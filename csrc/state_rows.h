// State of the rows' size beside the rows, for the passes that update it in place and sum something on the way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastmtl/row_table.h"
#include "fastmtl/slices.h"

namespace fastmtl {

/// The state as the dispatcher's other lists of rows are.
inline TensorList as_rows(std::vector<Tensor> const& state) { return {state.begin(), state.end()}; }

struct StateRows {
  RowTable state;  // No gaps; all rows of a parameter lie in its layout, so that they are written in place.
  RowTable rows;   // Brought to that layout.
  std::vector<Segment> segments{};
  bool converts = false;  // Whether some tensor is not of the type it is updated in.

  /// Both lists must outlive this.
  StateRows(TensorList const& state_list, TensorList const& row_list, int64_t num_rows)
      : state(state_list, num_rows), rows(row_list, num_rows) {
    STD_TORCH_CHECK(state.width() == rows.width(), "state must hold one tensor for each tensor of rows");
    for (int64_t k = 0; k < rows.width(); ++k) {
      Parameter const& parameter = state.parameter(k);
      rows.set_shape(k, parameter.shape);
      rows.set_layout(k, parameter.strides.data());
      for (int64_t t = 0; t < num_rows; ++t) {
        bool const dense = parameter.numel == 0 || Shape(*state.row(t, k).tensor).dense();
        STD_TORCH_CHECK(state.row(t, k).matches && dense, "the state of a parameter must have one dense layout");
        if (rows.row(t, k).tensor != nullptr) rows.match(t, k);
        converts |= state.row(t, k).dtype != type(k) || (rows.row(t, k).tensor && rows.row(t, k).dtype != type(k));
      }
      segments.push_back({k, parameter.numel, 0});
    }
  }

  /// The type in which a parameter is updated.
  DType type(int64_t k) const {
    bool const wide = state.parameter(k).dtype == DType::f64 || rows.parameter(k).dtype == DType::f64;
    return wide ? DType::f64 : DType::f32;
  }

  std::vector<Slice> slices() const {
    constexpr int64_t min_slice_elements = 32768;
    return cut(segments, min_slice_elements / rows.num_rows());
  }
};

}  // namespace fastmtl
