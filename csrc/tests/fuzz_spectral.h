// Cases of the solvers that rest on eigenvalues, against a two-sided Jacobi method in long double.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "fastmtl/aligned.h"
#include "fastmtl/config.h"
#include "fastmtl/eigh.h"
#include "fastmtl/imtl.h"
#include "fuzz_trial.h"

namespace fuzz {

/// Eigenvalues and, row by row, eigenvectors of a symmetric matrix.
struct Spectrum {
  int n;
  std::vector<Wide> value;
  std::vector<Wide> vectors;

  Wide const* vector(int k) const { return &vectors[static_cast<size_t>(k) * n]; }
  Wide sum(int k) const {
    Wide total = 0;
    for (int i = 0; i < n; ++i) total += vector(k)[i];
    return total;
  }
  /// Whether no eigenvalue is so near `floor` that rounding decides on which side it is.
  bool decided(Wide floor) const {
    return std::none_of(value.begin(), value.end(), [&](Wide x) { return x > 0.5L * floor && x < 2 * floor; });
  }
  Wide largest() const { return *std::max_element(value.begin(), value.end()); }
};

/// Cyclic Jacobi rotations of diag(scale) G diag(scale) until nothing but rounding is off the diagonal.
inline Spectrum spectrum_of(Gram const& gram, std::vector<Wide> const& scale) {
  int const n = gram.n;
  std::vector<Wide> a(static_cast<size_t>(n) * n);
  Spectrum spectrum{n, std::vector<Wide>(n), std::vector<Wide>(a.size())};
  std::vector<Wide>& v = spectrum.vectors;
  for (int i = 0; i < n; ++i) {
    v[i * n + i] = 1;
    for (int j = 0; j < n; ++j) a[i * n + j] = scale[i] * gram(i, j) * scale[j];
  }
  for (bool rotated = true; rotated;) {
    rotated = false;
    Wide trace = 0;
    for (int i = 0; i < n; ++i) trace += std::fabs(a[i * n + i]);
    for (int p = 0; p < n; ++p) {
      for (int q = p + 1; q < n; ++q) {
        if (std::fabs(a[p * n + q]) <= 1e-18L * trace) continue;
        rotated = true;
        Wide const cotangent = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
        Wide const tangent =
            std::copysign(1 / (std::fabs(cotangent) + std::sqrt(1 + cotangent * cotangent)), cotangent);
        Wide const cosine = 1 / std::sqrt(1 + tangent * tangent);
        Wide const sine = cosine * tangent;
        auto turn = [&](Wide& x, Wide& y) {
          Wide const old = x;
          x = cosine * old - sine * y;
          y = sine * old + cosine * y;
        };
        for (int k = 0; k < n; ++k) turn(a[k * n + p], a[k * n + q]);
        for (int k = 0; k < n; ++k) turn(a[p * n + k], a[q * n + k]);
        for (int k = 0; k < n; ++k) turn(v[p * n + k], v[q * n + k]);
        a[p * n + q] = a[q * n + p] = 0;
      }
    }
  }
  for (int i = 0; i < n; ++i) spectrum.value[i] = a[i * n + i];
  return spectrum;
}

/// Above it, the reference takes too long for every case.
inline constexpr int kMostSpectral = 66;

inline bool has_spectrum(Trial& trial) {
  return trial.exact() && (trial.gram.n <= kMostSpectral || trial.draw.chance(0.2));
}

inline void fuzz_eigh(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  if (trial.not_finite()) return;
  bool const unit = trial.draw.chance(0.5);
  trial.parameters << (unit ? " cosines" : " as it is");
  Vector scale(n, 1.0);
  for (int i = 0; i < n && unit; ++i) scale[i] = gram.zero(i) ? 0 : static_cast<double>(1 / gram.length(i));
  // The rows, and behind them the eigenvalues and their number.
  auto solve = [&](Shape shape) {
    auto body = [&](auto const& team, double* result, double* memory) {
      fastmtl::Eigh const eigh = fastmtl::solve_eigh(team, n, gram.entries.data(), scale.data(), memory);
      if (team.rank() != 0) return;
      std::fill_n(result, int64_t{n} * n + n + 1, 0.0);
      std::copy_n(eigh.rows, int64_t{n} * eigh.rank, result);
      std::copy_n(eigh.value, eigh.rank, result + int64_t{n} * n);
      result[int64_t{n} * n + n] = eigh.rank;
    };
    return trial.solve(shape, fastmtl::Eigh::storage(n), body, int64_t{n} * n + n + 1);
  };
  auto check = [&](Vector const& result, std::string const& where) {
    if (!trial.sane(result, false) || gram.kind == "indefinite") return;
    int const rank = static_cast<int>(result.back());
    double const* const value = &result[static_cast<size_t>(n) * n];
    Wide trace = 0;
    for (int i = 0; i < n; ++i) trace += static_cast<Wide>(scale[i]) * gram(i, i) * scale[i];
    Wide skew = 0;
    for (int k = 0; k < rank; ++k) {
      for (int l = 0; l <= k; ++l) {
        Wide product = 0;
        for (int i = 0; i < n; ++i) product += static_cast<Wide>(result[k * n + i]) * result[l * n + i];
        Wide const length = std::sqrt(static_cast<Wide>(value[k]) * value[l]);
        skew = std::max(skew, std::fabs(product - (k == l ? value[k] : 0)) / length);
      }
    }
    trial.within(skew / (2 * (n + 8) * 0x1p-52L), "orthogonality, " + where);
    if (!trial.exact()) return;
    Wide off = 0;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        Wide product = -static_cast<Wide>(scale[i]) * gram(i, j) * scale[j];
        for (int k = 0; k < rank; ++k) product += static_cast<Wide>(result[k * n + i]) * result[k * n + j];
        off = std::max(off, std::fabs(product));
      }
    }
    trial.check(trace > 0 || rank == 0, "a rank without a trace, " + where);
    if (trace > 0) trial.within(off / (32 * n * 0x1p-52L * trace), "product, " + where);
  };
  on_one_and_many(trial, solve, check, [](Vector const&, Vector const&) {});
}

inline void fuzz_aligned(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  bool const reference = has_spectrum(trial);
  Spectrum const spectrum = reference ? spectrum_of(gram, std::vector<Wide>(n, 1)) : Spectrum{};
  auto solve = [&](Shape shape) {
    return trial.solve(shape, fastmtl::aligned_workspace(n), [&](auto const& team, double* weights, double* memory) {
      fastmtl::aligned(team, n, gram.entries.data(), weights, memory);
    });
  };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (!trial.sane(weights, trial.not_finite()) || !reference) return;
    Wide const floor = n * 0x1p-23L * spectrum.largest();
    if (floor <= 0) trial.check(weights == Vector(n), "zero rows have weights, " + where);
    if (floor <= 0 || !spectrum.decided(floor)) return;
    Wide smallest = spectrum.largest();
    for (Wide value : spectrum.value) smallest = value > floor ? std::min(smallest, value) : smallest;
    // G^(1/2) w less sqrt(min lambda) 1, both on the span of the eigenvalues that count.
    std::vector<Wide> off(n);
    for (int k = 0; k < n; ++k) {
      if (spectrum.value[k] <= floor) continue;
      Wide share = -std::sqrt(smallest) * spectrum.sum(k);
      for (int i = 0; i < n; ++i) share += std::sqrt(spectrum.value[k]) * spectrum.vector(k)[i] * weights[i];
      for (int i = 0; i < n; ++i) off[i] += share * spectrum.vector(k)[i];
    }
    Wide worst = 0;
    for (Wide x : off) worst = std::max(worst, std::fabs(x));
    trial.within(worst / (1e-9L * std::sqrt(smallest)), "aligned gradients, " + where);
  };
  on_one_and_many(trial, solve, check, [](Vector const&, Vector const&) {});
}

/// The direction of equal projections: x = pinv(C) 1 and C x.
struct EqualDirection {
  Spectrum spectrum{};
  std::vector<Wide> weight{};
  std::vector<Wide> image{};
  Wide reached = 0;
  bool decided = false;     // whether rounding decides nothing
  bool well_posed = false;  // whether all eigenvalues of rows that are not zero count
};

inline EqualDirection equal_direction(Gram const& gram) {
  int const n = gram.n;
  std::vector<Wide> scale(n);
  int count = 0;
  for (int i = 0; i < n; ++i) {
    scale[i] = gram.zero(i) ? 0 : 1 / gram.length(i);
    count += !gram.zero(i);
  }
  EqualDirection direction{spectrum_of(gram, scale), std::vector<Wide>(n), std::vector<Wide>(n)};
  Wide const floor = n * 0x1p-23L;
  int kept = 0;
  for (int k = 0; k < n; ++k) {
    if (direction.spectrum.value[k] <= floor) continue;
    ++kept;
    Wide const sum = direction.spectrum.sum(k);
    direction.reached += sum * sum;
    for (int i = 0; i < n; ++i) {
      direction.weight[i] += sum / direction.spectrum.value[k] * direction.spectrum.vector(k)[i];
      direction.image[i] += sum * direction.spectrum.vector(k)[i];
    }
  }
  // A zero row's own eigenvector takes no part: ones are summed over the rows that are not zero by its value of zero.
  Wide const edge = floor * count;
  direction.decided = direction.spectrum.decided(floor) &&
                      (count == 0 || direction.reached <= 0.5L * edge || direction.reached >= 2 * edge);
  direction.well_posed = direction.decided && kept == count && count > 0;
  if (!(direction.reached > edge)) {
    std::fill(direction.weight.begin(), direction.weight.end(), 0);
    std::fill(direction.image.begin(), direction.image.end(), 0);
  }
  return direction;
}

/// The largest difference of two projections onto the rows' directions, in units of 1e-12 sum_j |w_j| d_j.
inline Wide projection_excess(Gram const& gram, Vector const& weights) {
  std::vector<Wide> const image = image_of(gram, weights);
  Wide mass = 0;
  Wide least = INFINITY;
  Wide most = -INFINITY;
  for (int i = 0; i < gram.n; ++i) {
    mass += std::fabs(weights[i]) * gram.length(i);
    if (gram.zero(i)) continue;
    least = std::min(least, image[i] / gram.length(i));
    most = std::max(most, image[i] / gram.length(i));
  }
  return (most - least) / (1e-12L * mass);
}

/// The length of sum_i (w_i - v_i) g_i.
inline Wide distance_to(Gram const& gram, Vector const& weights, std::vector<Wide> const& wanted) {
  Wide square = 0;
  for (int i = 0; i < gram.n; ++i) {
    for (int j = 0; j < gram.n; ++j) {
      square += (weights[i] - wanted[i]) * gram(i, j) * (weights[j] - wanted[j]);
    }
  }
  return std::sqrt(std::fmax(square, 0.0L));
}

/// How far float64 may take a pseudo-inverse's direction where eigenvalues as small as float32's rounding count.
inline constexpr Wide kPinvAccuracy = 1e-7L;

inline void fuzz_config(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  bool const reference = has_spectrum(trial);
  EqualDirection const wanted = reference ? equal_direction(gram) : EqualDirection{};
  auto solve = [&](Shape shape) {
    return trial.solve(shape, fastmtl::config_workspace(n), [&](auto const& team, double* weights, double* memory) {
      fastmtl::config(team, n, gram.entries.data(), weights, memory);
    });
  };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (!trial.sane(weights, trial.not_finite())) return;
    for (int i = 0; i < n; ++i) trial.check(!gram.zero(i) || weights[i] == 0, "a zero row has weight, " + where);
    if (!wanted.decided) return;
    Wide square = 0;
    Wide projected = 0;
    Wide magnitude = 0;
    for (int i = 0; i < n; ++i) {
      square += wanted.weight[i] * wanted.image[i];
      magnitude += gram.length(i);
      projected += gram.length(i) * wanted.image[i];
    }
    if (square == 0) {
      trial.check(weights == Vector(n), "weights without a direction, " + where);
      return;
    }
    std::vector<Wide> expected(n);
    for (int i = 0; i < n; ++i) {
      if (!gram.zero(i)) expected[i] = wanted.weight[i] / gram.length(i) * projected / square;
    }
    // The projections, of which the update's length is the sum, can cancel.
    Wide const granted = kPinvAccuracy * magnitude / std::sqrt(square);
    trial.within(distance_to(gram, weights, expected) / granted, "update, " + where);
    if (wanted.well_posed) trial.within(projection_excess(gram, weights), "projections, " + where);
  };
  on_one_and_many(trial, solve, check, [](Vector const&, Vector const&) {});
}

inline void fuzz_imtl(Trial& trial) {
  Gram const& gram = trial.gram;
  int const n = gram.n;
  bool const reference = has_spectrum(trial);
  EqualDirection const wanted = reference ? equal_direction(gram) : EqualDirection{};
  auto solve = [&](Shape shape) {
    return trial.solve(shape, fastmtl::imtl_workspace(n), [&](auto const& team, double* weights, double* memory) {
      fastmtl::imtl(team, n, gram.entries.data(), weights, memory);
    });
  };
  auto check = [&](Vector const& weights, std::string const& where) {
    if (!trial.sane(weights, trial.not_finite())) return;
    Wide total = -1;
    Wide mass = 0;
    Wide even = 0;
    for (int i = 0; i < n; ++i) {
      total += weights[i];
      mass += std::fabs(weights[i]);
      even += gram.zero(i) ? 0 : 1 / gram.length(i);
    }
    if (trial.exact()) trial.check(std::fabs(total) <= 1e-14L * mass, "does not sum to one, " + where);
    for (int i = 0; i < n; ++i) {
      trial.check(even == 0 ? weights[i] == 1.0 / n : !gram.zero(i) || weights[i] == 0, "zero rows, " + where);
    }
    if (!wanted.decided || even == 0) return;
    Wide sum = 0;
    Wide magnitude = 0;
    for (int i = 0; i < n; ++i) {
      Wide const weight = gram.zero(i) ? 0 : wanted.weight[i] / gram.length(i);
      sum += weight;
      magnitude += std::fabs(weight);
    }
    Wide const edge = n * 0x1p-23L * magnitude;
    bool const cancels = std::fabs(sum) <= edge;
    // Where the sum nearly cancels, what it is divided by is as little known as it is small.
    if (!cancels && std::fabs(sum) < 1e-2L * magnitude && !wanted.well_posed) return;
    if (std::fabs(sum) > 0.5L * edge && std::fabs(sum) < 2 * edge) return;
    std::vector<Wide> expected(n);
    for (int i = 0; i < n; ++i) {
      if (!gram.zero(i)) expected[i] = (cancels ? 1 / even : wanted.weight[i] / sum) / gram.length(i);
    }
    bool const clear = cancels || std::fabs(sum) > 1e-2L * magnitude;
    if (cancels) {
      for (int i = 0; i < n; ++i) {
        trial.check(std::fabs(weights[i] - expected[i]) <= 1e-13L * expected[i], "mean of unit gradients, " + where);
      }
    } else if (clear) {
      Wide mass = 0;
      for (int i = 0; i < n; ++i) mass += std::fabs(expected[i]) * gram.length(i);
      trial.within(distance_to(gram, weights, expected) / (kPinvAccuracy * mass), "update, " + where);
    }
    if (wanted.well_posed && !cancels) trial.within(projection_excess(gram, weights), "projections, " + where);
  };
  on_one_and_many(trial, solve, check, [](Vector const&, Vector const&) {});
}

}  // namespace fuzz
