// Gram matrices that break solvers, drawn at random: every size from 1 to 128, every kind, every length of row.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <string_view>
#include <vector>

namespace fuzz {

using Vector = std::vector<double>;
using Wide = long double;

/// Random numbers of one case. The distributions are our own, so that a seed means the same with every library.
class Draw {
 public:
  explicit Draw(uint64_t seed) : engine_(seed) {}

  double uniform(double low, double high) {
    return low + (high - low) * 0x1p-53 * static_cast<double>(engine_() >> 11);
  }
  int below(int count) { return static_cast<int>(engine_() % static_cast<uint64_t>(count)); }
  bool chance(double share) { return uniform(0, 1) < share; }
  double power(double low, double high) { return std::pow(10.0, uniform(low, high)); }
  double sign() { return chance(0.5) ? 1.0 : -1.0; }
  double normal() {
    return std::sqrt(-2 * std::log(uniform(0x1p-53, 1))) * std::cos(2 * 3.141592653589793 * uniform(0, 1));
  }
  template <class T, size_t count>
  T among(std::array<T, count> const& choices) {
    return choices[below(count)];
  }

 private:
  std::mt19937_64 engine_;
};

/// What a matrix promises: the specification's bounds, a result that is a number, or nothing but NaN.
enum class Promise { bound, number, none };

/// The Gram matrix of n rows of `width` numbers; with less promised than the bounds, `entries` is not quite theirs.
struct Gram {
  std::string_view kind;
  Promise promise = Promise::bound;
  int n = 0;
  int width = 0;
  Vector rows;
  Vector entries;

  double const* row(int i) const { return &rows[static_cast<size_t>(i) * width]; }
  double operator()(int i, int j) const { return entries[static_cast<size_t>(i) * n + j]; }
  Wide length(int i) const { return std::sqrt(std::fmax(static_cast<Wide>((*this)(i, i)), 0.0L)); }
  bool zero(int i) const { return (*this)(i, i) <= 0; }
  void set(int i, int j, double value) {
    entries[static_cast<size_t>(i) * n + j] = entries[static_cast<size_t>(j) * n + i] = value;
  }
};

inline constexpr std::array<std::string_view, 22> kKinds{
    "full rank",    "rank deficient",  "rank one",    "duplicates",      "opposite pairs", "zero rows",
    "all zero",     "one long row",    "far apart",   "near parallel",   "near opposite",  "stationary",
    "part at rest", "near stationary", "conflicting", "ill-conditioned", "integers",       "orthogonal",
    "float32",      "coarse",          "indefinite",  "not finite"};

/// The kinds from here on promise less than the bounds.
inline constexpr int kFirstInexact = 18;

namespace detail {

inline void fill_rows(Gram& gram, int kind, Draw& draw) {
  int const n = gram.n;
  int const width = gram.width;
  Vector& rows = gram.rows;
  auto at = [&](int i, int k) -> double& { return rows[static_cast<size_t>(i) * width + k]; };
  auto set_all = [&](auto const& change) {
    // From the last row to the first: what a row becomes may depend on the ones before it.
    for (int i = n - 1; i >= 0; --i) {
      for (int k = 0; k < width; ++k) at(i, k) = change(i, k);
    }
  };
  auto take_off_mean = [&](int count, double share) {
    for (int k = 0; k < width; ++k) {
      double mean = 0;
      for (int i = 0; i < count; ++i) mean += at(i, k) / count;
      for (int i = 0; i < count; ++i) at(i, k) -= share * mean;
    }
  };
  for (double& x : rows) x = draw.normal();
  double const small = draw.power(-9, -1);
  Vector factor(n);
  if (kKinds[kind] == "rank one") {
    for (double& f : factor) f = draw.normal();
    set_all([&](int i, int k) { return factor[i] * at(0, k); });
  } else if (kKinds[kind] == "duplicates" || kKinds[kind] == "opposite pairs") {
    double const other = kKinds[kind] == "duplicates" ? 1 : draw.chance(0.5) ? -1 : -draw.power(-3, 3);
    set_all([&](int i, int k) { return i % 2 ? other * at(i - 1, k) : at(i, k); });
  } else if (kKinds[kind] == "zero rows") {
    for (double& f : factor) f = draw.chance(0.6);
    set_all([&](int i, int k) { return factor[i] * at(i, k); });
  } else if (kKinds[kind] == "all zero") {
    set_all([](int, int) { return 0.0; });
  } else if (kKinds[kind] == "one long row") {
    int const chosen = draw.below(n);
    double const ratio = draw.power(3, 12) * (draw.chance(0.3) ? 1e-13 : 1);
    set_all([&](int i, int k) { return (i == chosen ? ratio : 1) * at(i, k); });
  } else if (kKinds[kind] == "far apart") {
    bool const all_scales = draw.chance(0.5);
    for (double& f : factor) f = all_scales ? draw.power(-15, 15) : draw.chance(0.5) ? 1e12 : 1;
    set_all([&](int i, int k) { return factor[i] * at(i, k); });
  } else if (kKinds[kind] == "near parallel" || kKinds[kind] == "near opposite") {
    double const other = kKinds[kind] == "near parallel" ? 1 : -1;
    set_all([&](int i, int k) { return (i % 2 ? other : 1) * at(0, k) + small * at(i, k); });
  } else if (kKinds[kind] == "stationary") {
    take_off_mean(n, 1);
  } else if (kKinds[kind] == "part at rest") {
    take_off_mean(1 + draw.below(n), 1);
  } else if (kKinds[kind] == "near stationary") {
    take_off_mean(n, 1 - small);
  } else if (kKinds[kind] == "conflicting") {
    set_all([&](int i, int k) { return (i % 2 ? -1 : 1) * at(0, k) + 0.05 * at(i, k); });
  } else if (kKinds[kind] == "ill-conditioned") {
    set_all([&](int i, int k) { return at(i, k) * std::pow(10.0, -12.0 * k / width); });
  } else if (kKinds[kind] == "integers") {
    set_all([&](int, int) { return static_cast<double>(draw.below(3) - 1); });
  } else if (kKinds[kind] == "orthogonal") {
    set_all([&](int i, int k) { return i == k ? draw.power(-6, 6) : 0.0; });
  }
  double const one_scale = draw.chance(0.25) ? draw.power(-15, 15) : 1;
  bool const own_scales = kKinds[kind] != "far apart" && draw.chance(0.25);
  double const spread = draw.uniform(0, 6);
  for (double& f : factor) f = own_scales ? draw.power(-spread, spread) : one_scale;
  set_all([&](int i, int k) { return factor[i] * at(i, k); });
}

inline void spoil(Gram& gram, Draw& draw) {
  int const n = gram.n;
  gram.promise = gram.kind == "not finite" ? Promise::none : Promise::number;
  if (gram.kind == "not finite") {
    double const bad = draw.among(std::array<double, 3>{NAN, INFINITY, -INFINITY});
    int const i = draw.below(n);
    int const j = draw.below(n);
    gram.entries[static_cast<size_t>(i) * n + j] = bad;
    if (draw.chance(0.8)) gram.set(i, j, bad);
    return;
  }
  double const error = gram.kind == "coarse" ? draw.power(-9, -4) : draw.power(-1, 0.5);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      if (gram.kind == "float32") {
        gram.set(i, j, static_cast<float>(gram(i, j)));
      } else if (gram.kind == "coarse") {
        gram.set(i, j, gram(i, j) * (1 + error * draw.normal()));
      } else if (i != j) {
        gram.set(i, j, static_cast<double>(gram.length(i) * gram.length(j)) * error * draw.uniform(-1, 1));
      }
    }
  }
  if (gram.kind == "indefinite" && draw.chance(0.3)) {
    int const i = draw.below(n);
    gram.set(i, i, draw.chance(0.5) ? -gram(i, i) : 0.0);
  }
}

}  // namespace detail

/// Small sizes more often; the ones beside a warp's and a block's edges as well.
inline int draw_size(Draw& draw, int most) {
  double const which = draw.uniform(0, 1);
  int const n = which < 0.7    ? 1 + draw.below(8)
                : which < 0.93 ? 1 + draw.below(33)
                : which < 0.96 ? draw.among(std::array<int, 9>{31, 32, 33, 63, 64, 65, 127, 128, 128})
                               : 1 + draw.below(128);
  return std::min(n, most);
}

inline Gram draw_gram(Draw& draw, int n) {
  int const kind = draw.below(static_cast<int>(kKinds.size()));
  Gram gram;
  gram.kind = kKinds[kind];
  gram.n = n;
  gram.width = gram.kind == "integers" ? 4 : gram.kind == "orthogonal" ? n : n + 3;
  // Matrices that are spoilt later are of lesser rank half of the time, so that they become indefinite.
  bool const narrow = gram.kind == "rank deficient" || (kind >= kFirstInexact && draw.chance(0.5));
  if (narrow) gram.width = n / (1 + draw.below(4)) + 1;
  gram.rows.resize(static_cast<size_t>(n) * gram.width);
  gram.entries.resize(static_cast<size_t>(n) * n);
  detail::fill_rows(gram, kind, draw);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double product = 0;
      for (int k = 0; k < gram.width; ++k) product += gram.row(i)[k] * gram.row(j)[k];
      gram.set(i, j, product);
    }
  }
  if (kind >= kFirstInexact) detail::spoil(gram, draw);
  return gram;
}

/// G w in long double.
inline std::vector<Wide> image_of(Gram const& gram, Vector const& weights) {
  std::vector<Wide> image(gram.n);
  for (int i = 0; i < gram.n; ++i) {
    for (int j = 0; j < gram.n; ++j) image[i] += static_cast<Wide>(gram(i, j)) * weights[j];
  }
  return image;
}

/// The square of the length of sum_i (a_i - b_i) g_i.
inline Wide apart(Gram const& gram, Vector const& a, Vector const& b) {
  Wide square = 0;
  for (int i = 0; i < gram.n; ++i) {
    Wide image = 0;
    for (int j = 0; j < gram.n; ++j) image += gram(i, j) * (static_cast<Wide>(a[j]) - b[j]);
    square += (static_cast<Wide>(a[i]) - b[i]) * image;
  }
  return square;
}

}  // namespace fuzz
