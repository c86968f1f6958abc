// The features of representations, whose batch comes first: the memory layout that all of them are brought to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fastmtl/row_table.h"

namespace fastmtl {

/// A copy with the given dense strides.
inline Tensor twin_of(Tensor const& tensor, std::vector<int64_t> const& strides, DType dtype) {
  Shape const shape(tensor);
  Tensor twin = empty_strided({shape.sizes, shape.sizes + shape.dim}, strides, dtype, &tensor);
  torch::stable::copy_(twin, tensor);
  return twin;
}

/// The layout of the features in all tensors, behind the batch: the dense one they share, else the contiguous one.
inline std::vector<int64_t> feature_strides(std::vector<Shape> const& shapes, int64_t features) {
  Shape const& first = shapes.front();
  Shape inner = first;
  inner.dim -= 1;
  inner.sizes += 1;
  inner.strides += 1;
  bool alike = features > 0 && inner.dense();
  for (Shape const& shape : shapes) {
    STD_TORCH_CHECK(shape.dim == first.dim && std::equal(shape.sizes + 1, shape.sizes + shape.dim, inner.sizes),
                    "reps and grads must have the same features");
    Shape features_of_it = inner;
    features_of_it.strides = shape.strides + 1;
    alike &= features_of_it.same_strides(inner.strides) && (shape.sizes[0] == 1 || shape.strides[0] == features);
  }
  return alike ? std::vector<int64_t>(inner.strides, inner.strides + inner.dim) : contiguous_strides(inner);
}

}  // namespace fastmtl
