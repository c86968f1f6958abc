// Projections onto the dual cone against their specification, on one lane and on teams of threads.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/dual_cone.h"
#include "thread_team.h"

namespace {

using fastmtl::ThreadTeam;
using Vector = std::vector<double>;

/// The Gram matrix of n normal rows; odd rows point against the first one, every third is `ratio` times as long.
Vector conflicting_gram(int n, int width, double ratio) {
  std::mt19937_64 random(n * 1000 + width);
  std::normal_distribution<double> normal;
  Vector rows(n * width);
  for (double& x : rows) x = normal(random);
  for (int i = n - 1; i >= 0; --i) {
    for (int k = 0; k < width; ++k) {
      double& x = rows[i * width + k];
      x = ((i % 2 ? -0.5 : 0.5) * rows[k] + x) * (i % 3 == 2 ? ratio : 1);
    }
  }
  Vector gram(n * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < width; ++k) gram[i * n + j] += rows[i * width + k] * rows[j * width + k];
    }
  }
  return gram;
}

Vector solve(int n, Vector const& gram, Vector const& target, int groups, int lanes) {
  Vector weights(n, NAN);
  Vector workspace(fastmtl::dual_cone_workspace(n), NAN);
  auto run = [&](auto const& team) {
    fastmtl::dual_cone(team, n, gram.data(), target.data(), weights.data(), workspace.data());
  };
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
  return weights;
}

/// The largest violation of the optimality conditions, in units of what the specification grants.
double excess(int n, Vector const& gram, Vector const& u, Vector const& v) {
  long double mass = 0;
  for (int i = 0; i < n; ++i) {
    if (!(v[i] >= u[i])) return INFINITY;
    mass += std::sqrt(static_cast<long double>(gram[i * n + i])) * (std::fabs(u[i]) + v[i] - u[i]);
  }
  double worst = 0;
  for (int i = 0; i < n; ++i) {
    long double image = 0;
    for (int j = 0; j < n; ++j) image += static_cast<long double>(gram[i * n + j]) * v[j];
    long double const wrong = v[i] > u[i] ? std::fabs(image) : -image;
    long double const allowed = 1e-12L * mass * std::sqrt(static_cast<long double>(gram[i * n + i]));
    if (wrong > 0) worst = std::max(worst, static_cast<double>(wrong / allowed));
  }
  return worst;
}

void test_bound(std::vector<int> const& sizes, int groups, int lanes) {
  for (int n : sizes) {
    for (int width : {n / 3 + 1, n + 3}) {
      for (double ratio : {1.0, 0.0, 1e9}) {
        Vector const gram = conflicting_gram(n, width, ratio);
        for (int task = 0; task < n; task += n / 3 + 1) {
          Vector target(n, 0.0);
          target[task] = 1;
          double const worst = excess(n, gram, target, solve(n, gram, target, groups, lanes));
          check(worst <= 1, "bound, T=" + std::to_string(n) + " on " + std::to_string(groups * lanes) +
                                " lanes: " + std::to_string(worst));
        }
      }
    }
  }
}

void test_lanes_agree() {
  Vector const gram = conflicting_gram(12, 15, 10);
  Vector const target(12, 1.0);
  Vector const one = solve(12, gram, target, 1, 1);
  Vector const many = solve(12, gram, target, 2, 4);
  for (int i = 0; i < 12; ++i) check(std::fabs(one[i] - many[i]) < 1e-9, "all lanes together find what one does");
}

void test_non_finite(int groups, int lanes) {
  auto all_nan = [](Vector const& weights) { return std::ranges::all_of(weights, [](double w) { return w != w; }); };
  for (double poison : {NAN, INFINITY, -INFINITY}) {
    Vector gram = conflicting_gram(5, 7, 1);
    Vector target(5, 1.0);
    target[3] = poison;
    check(all_nan(solve(5, gram, target, groups, lanes)), "a non-finite target gives NaN");
    gram[7] = poison;
    check(all_nan(solve(5, gram, Vector(5, 1.0), groups, lanes)), "a non-finite G gives NaN");
  }
}

/// Coarse rounding leaves matrices with negative eigenvalues: the objective may have no minimum.
void test_indefinite_stays_finite(int groups, int lanes) {
  Vector const gram{1, -2, -2, -2, 1, -2, -2, -2, 1};
  Vector const target{1, 0, 0};
  for (double w : solve(3, gram, target, groups, lanes)) check(std::isfinite(w) && w >= 0, "indefinite G");
}

}  // namespace

int main() {
  test_bound({1, 2, 3, 8, 40, 128}, 1, 1);
  test_bound({1, 3, 16}, 2, 2);
  test_bound({2, 24}, 4, 8);
  test_lanes_agree();
  test_non_finite(1, 1);
  test_non_finite(2, 2);
  test_indefinite_stays_finite(1, 1);
  test_indefinite_stays_finite(1, 3);
  return finish("dual_cone");
}
