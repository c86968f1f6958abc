// What the ops of all T x T solvers share on every device: checks, dense float64 input, one launch.
//
// The op of a solver is written once, in csrc/<op>.cpp; kernels/<op>.cu includes that file. It hands a problem to a
// launch: a struct with `template <class Team> void solve(Team const& team, int index, double* memory) const`, which
// calls a solver of csrc/include/fastmtl/ on problem number `index`.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#if defined(__CUDACC__)
#include "solver.cuh"
#else
#include "solver_cpu.h"
#endif

namespace fastmtl {

#if defined(__CUDACC__)
using Place = OnDevice;
#else
using Place = OnCpu;
#endif

inline bool is_real_float(Tensor const& tensor) {
  ScalarType const type = tensor.scalar_type();
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

/// The tensor itself where it is there, dense and of that dtype, else a copy that is.
inline Tensor dense(Place const& on, Tensor const& tensor, ScalarType dtype = ScalarType::Double) {
  if (on.holds(tensor) && tensor.scalar_type() == dtype && tensor.is_contiguous()) return tensor;
  Tensor copy = on.empty(tensor.sizes(), dtype);
  torch::stable::copy_(copy, tensor);
  return copy;
}

/// A checked (T,) vector as dense float64; nothing stays nothing.
inline std::optional<Tensor> dense_vector(Place const& on, std::optional<Tensor> const& vector, int64_t size,
                                          char const* name) {
  if (!vector) return std::nullopt;
  STD_TORCH_CHECK(is_real_float(*vector) && on.holds(*vector) && vector->dim() == 1 && vector->size(0) == size, name,
                  " must hold one float per row, on its device");
  return dense(on, *vector);
}

inline double const* data_of(Tensor const& tensor) { return static_cast<double const*>(tensor.const_data_ptr()); }
inline double const* data_of(std::optional<Tensor> const& tensor) { return tensor ? data_of(*tensor) : nullptr; }
inline double* mutable_data_of(Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

/// A checked Gram matrix (T, T), or those of L groups of parameters (L, T, T), as dense float64, and where they are.
struct Gram {
  Place on;
  Tensor tensor;
  bool grouped;
  int n;
  int64_t count;  // L, or 1.

  explicit Gram(Tensor const& gram)
      : on(gram),
        tensor(checked(on, gram)),
        grouped(gram.dim() == 3),
        n(static_cast<int>(gram.size(gram.dim() - 1))),
        count(grouped ? gram.size(0) : 1) {}

  double const* data() const { return data_of(tensor); }

  /// Room for the weights: (T,), or (L, T).
  Tensor room() const { return grouped ? on.empty({count, n}) : on.empty({n}); }

  /// Checked vectors, one for each matrix, as dense float64; nothing stays nothing.
  std::optional<Tensor> vectors(std::optional<Tensor> const& vector, char const* name) const {
    if (!vector || !grouped) return dense_vector(on, vector, n, name);
    STD_TORCH_CHECK(is_real_float(*vector) && on.holds(*vector) && vector->dim() == 2 && vector->size(0) == count &&
                        vector->size(1) == n,
                    name, " must hold one float per row of gram, on its device");
    return dense(on, *vector);
  }

  /// The weights of one Problem{n, gram, weights, options...} for each group.
  template <class Problem, class... Options>
  Tensor solve(int64_t (*doubles)(int), Options... options) const {
    Tensor weights = room();
    launch_solver(on, Problem{n, data(), mutable_data_of(weights), options...}, n, doubles(n), count);
    return weights;
  }

 private:
  static Tensor checked(Place const& on, Tensor const& gram) {
    int64_t const dims = gram.dim();
    STD_TORCH_CHECK((dims == 2 || dims == 3) && gram.size(dims - 1) == gram.size(dims - 2) && gram.numel() > 0,
                    "gram must be (T, T) or (L, T, T)");
    STD_TORCH_CHECK(is_real_float(gram), "gram must be floats");
    return dense(on, gram);
  }
};

}  // namespace fastmtl
