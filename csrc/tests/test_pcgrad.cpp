// PCGrad's weights on one lane and on teams of threads, against the algorithm on the gradients.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/pcgrad.h"
#include "thread_team.h"

namespace {

using fastmtl::ThreadTeam;
using Vector = std::vector<double>;
using Orders = std::vector<int64_t>;

double dot(int width, double const* x, double const* y) {
  double sum = 0;
  for (int k = 0; k < width; ++k) sum += x[k] * y[k];
  return sum;
}

Vector random_rows(int n, int width, int seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  Vector rows(n * width);
  for (double& x : rows) x = normal(random);
  return rows;
}

Vector gram_of(int n, int width, Vector const& rows) {
  Vector gram(n * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) gram[i * n + j] = dot(width, &rows[i * width], &rows[j * width]);
  }
  return gram;
}

Orders random_orders(int n) {
  std::mt19937_64 random(n);
  Orders orders(n * n);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) orders[i * n + j] = j;
    std::shuffle(&orders[i * n], &orders[i * n] + n, random);
  }
  return orders;
}

Vector solve(int n, Vector const& gram, Orders const& orders, int groups, int lanes) {
  Vector weights(n, NAN);
  Vector workspace(fastmtl::pcgrad_workspace(n, groups), NAN);
  auto run = [&](auto const& team) {
    fastmtl::pcgrad(team, n, static_cast<int64_t>(orders.size()) / n, gram.data(), orders.data(), weights.data(),
                    workspace.data());
  };
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
  return weights;
}

void test_update(std::vector<int> const& sizes, int groups, int lanes) {
  for (int n : sizes) {
    for (int width : {n / 3 + 1, n + 3}) {
      Vector const rows = random_rows(n, width, n);
      Orders const orders = random_orders(n);
      Vector const weights = solve(n, gram_of(n, width, rows), orders, groups, lanes);
      Vector difference(width);
      for (int i = 0; i < n; ++i) {
        Vector p(&rows[i * width], &rows[i * width] + width);
        for (int s = 0; s < n; ++s) {
          double const* const other = &rows[orders[i * n + s] * width];
          double const amount = std::max(0.0, -dot(width, p.data(), other) / dot(width, other, other));
          for (int k = 0; k < width; ++k) p[k] += amount * other[k];
        }
        for (int k = 0; k < width; ++k) difference[k] += p[k] - weights[i] * rows[i * width + k];
      }
      double const error = std::sqrt(dot(width, difference.data(), difference.data()));
      check(error < 1e-12 * n * std::sqrt(width),
            "update of " + std::to_string(n) + " tasks on " + std::to_string(groups) + " x " + std::to_string(lanes));
    }
  }
}

/// What is no task is passed over, without touching memory there.
void test_strange_orders(int groups, int lanes) {
  int const n = 5;
  Vector const gram = gram_of(n, 3, random_rows(n, 3, 0));
  Orders const plain = random_orders(n);
  Orders strange;
  for (size_t entry = 0; entry < plain.size(); ++entry) {
    for (int64_t none : {int64_t{-1}, int64_t{n}, INT64_MIN, INT64_MAX}) strange.push_back(none);
    strange.push_back(plain[entry]);
  }
  check(solve(n, gram, strange, groups, lanes) == solve(n, gram, plain, groups, lanes), "strange orders");
}

void test_non_finite(int groups, int lanes) {
  for (double bad : {double{NAN}, HUGE_VAL, -HUGE_VAL}) {
    Vector gram = gram_of(4, 4, random_rows(4, 4, 0));
    gram[6] = gram[9] = bad;
    for (double w : solve(4, gram, random_orders(4), groups, lanes)) check(std::isnan(w), "non-finite");
  }
}

}  // namespace

int main() {
  test_update({1, 2, 3, 8, 40, 128}, 1, 1);
  test_update({1, 3, 16}, 1, 4);
  test_update({1, 2, 7, 16}, 3, 2);
  test_strange_orders(1, 1);
  test_strange_orders(2, 3);
  test_non_finite(1, 1);
  test_non_finite(2, 2);
  return finish("pcgrad");
}
