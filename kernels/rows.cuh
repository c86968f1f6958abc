// The rows of an op on a GPU: brought to one dtype and layout per parameter, and sorted into launches of one dtype.
#pragma once

#include <vector>

#include "device.cuh"
#include "fastmtl/launch_plan.h"
#include "fastmtl/row_table.h"
#include "vector.cuh"

namespace fastmtl {

inline Tensor const& first_tensor(TensorList const& flat) {
  for (std::optional<Tensor> const& tensor : flat) {
    if (tensor.has_value()) return *tensor;
  }
  STD_TORCH_CHECK(false, "rows must hold a tensor");
}

inline void check_device(OnDevice const& on, TensorList const& flat) {
  for (std::optional<Tensor> const& tensor : flat) {
    STD_TORCH_CHECK(!tensor.has_value() || on.holds(*tensor), "rows must be on one device");
  }
}

inline int64_t item_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

/// Brings all rows of parameter k to one dtype and layout; returns their pointers, null where a row has no tensor.
inline std::vector<void const*> pointers_of(RowTable& rows, int64_t k) {
  std::vector<void const*> pointers;
  for (int64_t t = 0; t < rows.num_rows(); ++t) {
    rows.match_all(t, k);
    pointers.push_back(rows.row(t, k).tensor == nullptr ? nullptr : rows.row(t, k).data);
  }
  return pointers;
}

/// Calls body with a value of the element type that kernels use for `dtype`.
template <class Body>
void with_storage(DType dtype, Body const& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::bf16:
      return body(Bf16{});
    case DType::f16:
      return body(F16{});
  }
}

constexpr DType kAllDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};

}  // namespace fastmtl
