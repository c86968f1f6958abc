// The rows of an op: T x K tensors from the dispatcher, brought to memory that kernels can walk with one pointer per
// row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <vector>

#include "fastmtl/prefetch.h"

namespace fastmtl {

using torch::stable::Tensor;
using TensorList = std::vector<std::optional<Tensor>>;

constexpr int64_t kMaxRows = 128;

enum class DType : uint8_t { f32, f64, bf16, f16 };

inline int32_t torch_dtype(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return aoti_torch_dtype_float64();
    case DType::bf16:
      return aoti_torch_dtype_bfloat16();
    case DType::f16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

inline DType dtype_of(Tensor const& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  for (DType const known : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    if (dtype == torch_dtype(known)) return known;
  }
  STD_TORCH_CHECK(false, "tensors must be float32, float64, bfloat16 or float16");
}

/// The dtype both can be converted to without loss.
inline DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
}

/// An uninitialised tensor on the CPU, or on the device of another one.
inline Tensor empty_strided(std::vector<int64_t> const& sizes, std::vector<int64_t> const& strides, DType dtype,
                            Tensor const* beside = nullptr) {
  int32_t type = aoti_torch_device_type_cpu();
  int32_t index = 0;
  if (beside != nullptr) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside->get(), &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside->get(), &index));
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  torch_dtype(dtype), type, index, &handle));
  return Tensor(handle);
}

/// Sizes and strides of a tensor; borrowed, valid while the tensor is.
struct Shape {
  int64_t dim = 0;
  int64_t const* sizes = nullptr;
  int64_t const* strides = nullptr;

  Shape() = default;
  explicit Shape(Tensor const& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dim));
    int64_t* borrowed = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &borrowed));
    sizes = borrowed;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &borrowed));
    strides = borrowed;
  }

  int64_t numel() const { return std::accumulate(sizes, sizes + dim, int64_t{1}, std::multiplies<>()); }

  bool same_sizes(Shape const& other) const { return dim == other.dim && std::equal(sizes, sizes + dim, other.sizes); }

  /// Whether the elements lie in the same order and distance; the stride of a dimension of one element says nothing.
  bool same_strides(int64_t const* other) const {
    for (int64_t d = 0; d < dim; ++d) {
      if (sizes[d] != 1 && strides[d] != other[d]) return false;
    }
    return true;
  }

  /// Whether the elements fill one block of memory, each once, in some order of the dimensions.
  bool dense() const {
    int64_t expected = 1;
    std::vector<std::pair<int64_t, int64_t>> moving;
    for (int64_t d = dim - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (moving.empty() && strides[d] == expected) {
        expected *= sizes[d];
      } else {
        moving.emplace_back(strides[d], sizes[d]);
      }
    }
    std::sort(moving.begin(), moving.end());
    for (auto const& [stride, size] : moving) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }
};

inline std::vector<int64_t> contiguous_strides(Shape const& shape) {
  std::vector<int64_t> strides(shape.dim);
  int64_t stride = 1;
  for (int64_t d = shape.dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape.sizes[d], 1);
  }
  return strides;
}

/// One row's tensor of one parameter.
struct Row {
  Tensor const* tensor = nullptr;  // None: a zero gradient.
  void const* data = nullptr;
  DType dtype = DType::f32;
  bool matches = true;  // Whether the memory has the layout of the parameter.
};

/// Where `length` elements of a row lie, from element `begin` on.
inline Span span_of(Row const& row, int64_t begin, int64_t length) {
  int64_t const size = bytes_of(row.dtype);
  return {static_cast<char const*>(row.data) + begin * size, length * size};
}

/// What the rows of one parameter have in common.
struct Parameter {
  Shape shape;  // Of the first row there is; strides are those below.
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;  // The dense layout all rows share, else the contiguous one.
  int64_t numel = 0;
  DType dtype = DType::f32;  // Promoted over the rows.
  bool present = false;      // Whether any row has it.
};

class RowTable {
 public:
  /// `flat` is task-major and must outlive the table.
  RowTable(TensorList const& flat, int64_t num_rows) : num_rows_(num_rows) {
    STD_TORCH_CHECK(num_rows >= 1 && num_rows <= kMaxRows, "there must be 1 to 128 rows");
    STD_TORCH_CHECK(flat.size() % num_rows == 0, "rows must have the same number of tensors each");
    auto const width = static_cast<int64_t>(flat.size()) / num_rows;
    parameters_.resize(width);
    rows_.resize(flat.size());
    for (int64_t k = 0; k < width; ++k) read(flat, k);
  }

  int64_t num_rows() const { return num_rows_; }
  int64_t width() const { return static_cast<int64_t>(parameters_.size()); }
  Parameter const& parameter(int64_t k) const { return parameters_[k]; }
  Row const& row(int64_t t, int64_t k) const { return rows_[k * num_rows_ + t]; }

  /// Sets the sizes of a parameter no row has, and checks those of one that some row has.
  void set_shape(int64_t k, Shape const& shape) {
    Parameter& parameter = parameters_[k];
    STD_TORCH_CHECK(!parameter.present || shape.same_sizes(parameter.shape), "out must have the shapes of the rows");
    parameter.shape = shape;
    parameter.sizes.assign(shape.sizes, shape.sizes + shape.dim);
    parameter.numel = shape.numel();
  }

  /// Asks for another layout of parameter k: that of a given tensor of the same sizes.
  void set_layout(int64_t k, int64_t const* strides) {
    Parameter& parameter = parameters_[k];
    parameter.strides.assign(strides, strides + parameter.shape.dim);
    for (int64_t t = 0; t < num_rows_; ++t) {
      Row& row = rows_[k * num_rows_ + t];
      if (row.tensor != nullptr) row.matches = Shape(*row.tensor).same_strides(strides);
    }
  }

  /// Brings one row to the layout of its parameter, by a copy if it has another.
  void match(int64_t t, int64_t k) {
    if (!row(t, k).matches) copy(t, k);
  }

  /// Brings one row to the layout and the dtype of its parameter.
  void match_all(int64_t t, int64_t k) {
    Row const& current = row(t, k);
    DType const dtype = parameters_[k].dtype;
    if (current.tensor != nullptr && (!current.matches || current.dtype != dtype)) copy(t, k, dtype);
  }

  /// Replaces one row by a copy of it, of the same or another dtype.
  void copy(int64_t t, int64_t k) { copy(t, k, row(t, k).dtype); }
  void copy(int64_t t, int64_t k, DType dtype) {
    Row& row = rows_[k * num_rows_ + t];
    Tensor twin = empty_strided(parameters_[k].sizes, parameters_[k].strides, dtype, row.tensor);
    torch::stable::copy_(twin, *row.tensor);
    row.data = twin.const_data_ptr();
    row.dtype = dtype;
    row.matches = true;
    owned_.push_back(std::move(twin));
  }

 private:
  void read(TensorList const& flat, int64_t k) {
    Parameter& parameter = parameters_[k];
    bool alike = true;
    for (int64_t t = 0; t < num_rows_; ++t) {
      std::optional<Tensor> const& tensor = flat[t * width() + k];
      if (!tensor.has_value()) continue;
      int32_t layout = 0;
      TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor->get(), &layout));
      STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), "rows must be dense tensors");
      Row& row = rows_[k * num_rows_ + t];
      row.tensor = &*tensor;
      row.data = tensor->const_data_ptr();
      row.dtype = dtype_of(*tensor);
      Shape const shape(*tensor);
      if (!parameter.present) {
        parameter.present = true;
        parameter.shape = shape;
        parameter.sizes.assign(shape.sizes, shape.sizes + shape.dim);
        parameter.numel = shape.numel();
        parameter.dtype = row.dtype;
        continue;
      }
      STD_TORCH_CHECK(shape.same_sizes(parameter.shape), "the tensors of one parameter must have one shape");
      parameter.dtype = promote(parameter.dtype, row.dtype);
      alike = alike && shape.same_strides(parameter.shape.strides);
    }
    if (!parameter.present) return;
    if (alike && parameter.numel > 0 && parameter.shape.dense()) {
      parameter.strides.assign(parameter.shape.strides, parameter.shape.strides + parameter.shape.dim);
    } else {
      std::vector<int64_t> const contiguous = contiguous_strides(parameter.shape);
      set_layout(k, contiguous.data());
    }
  }

  int64_t num_rows_;
  std::vector<Parameter> parameters_;
  std::vector<Row> rows_;
  std::vector<Tensor> owned_;
};

/// The group of each of `width` parameters: all 0 where none are given. Sets the number of groups.
inline std::vector<int64_t> group_of_each(std::optional<std::vector<int64_t>> const& groups, int64_t width,
                                          int64_t* num_groups) {
  if (!groups.has_value()) {
    *num_groups = 1;
    return std::vector<int64_t>(width, 0);
  }
  STD_TORCH_CHECK(static_cast<int64_t>(groups->size()) == width, "groups must name one group for each tensor of a row");
  *num_groups = 0;
  for (int64_t const group : *groups) {
    STD_TORCH_CHECK(group >= 0, "groups must be at least 0");
    *num_groups = std::max(*num_groups, group + 1);
  }
  return *groups;
}

}  // namespace fastmtl
