// Gradient Vaccine on one lane and on teams of threads: against the algorithm on the gradients, and each other.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/gradvac.h"
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

/// Random gradients, orders and averages.
struct Problem {
  int n;
  int width;
  Vector rows;
  Vector gram;
  Orders orders;
  Vector rho;

  Problem(int n, int width) : n(n), width(width), rows(n * width), gram(n * n), orders(n * n), rho(n * n) {
    std::mt19937_64 random(n);
    std::normal_distribution<double> normal;
    for (double& x : rows) x = normal(random);
    for (double& x : rho) x = std::uniform_real_distribution<double>(-0.8, 0.8)(random);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        gram[i * n + j] = dot(width, &rows[i * width], &rows[j * width]);
        orders[i * n + j] = j;
      }
      std::shuffle(&orders[i * n], &orders[i * n] + n, random);
    }
  }
};

struct Answer {
  Vector weights;
  Vector rho;
};

Answer solve(Problem const& problem, double beta, int groups, int lanes) {
  int const n = problem.n;
  Answer answer{Vector(n, NAN), problem.rho};
  Vector workspace(fastmtl::gradvac_workspace(n, groups), NAN);
  auto run = [&](auto const& team) {
    fastmtl::gradvac(team, n, static_cast<int64_t>(problem.orders.size()) / n, problem.gram.data(),
                     problem.orders.data(), beta, answer.rho.data(), answer.weights.data(), workspace.data());
  };
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
  return answer;
}

double distance(Vector const& x, Vector const& y) {
  double worst = 0;
  for (size_t k = 0; k < x.size(); ++k) worst = std::max(worst, std::fabs(x[k] - y[k]));
  return worst;
}

/// Weights and averages as the algorithm gives them that works on the gradients and knows no special case.
Answer on_gradients(Problem const& problem, double beta) {
  int const n = problem.n;
  int const width = problem.width;
  Answer answer{Vector(n, 1.0), problem.rho};
  for (int i = 0; i < n; ++i) {
    Vector p(&problem.rows[i * width], &problem.rows[i * width] + width);
    for (int s = 0; s < n; ++s) {
      int const j = static_cast<int>(problem.orders[i * n + s]);
      if (j == i) continue;
      double const* const other = &problem.rows[j * width];
      double const norm = std::sqrt(dot(width, p.data(), p.data()));
      double const length = std::sqrt(dot(width, other, other));
      double const cosine = dot(width, p.data(), other) / (norm * length);
      double& target = answer.rho[i * n + j];
      if (cosine < target) {
        double const sine = std::sqrt(1 - target * target);
        double const amount = norm * (target * std::sqrt(1 - cosine * cosine) - cosine * sine) / (length * sine);
        for (int k = 0; k < width; ++k) p[k] += amount * other[k];
        answer.weights[j] += amount;
      }
      target = (1 - beta) * target + beta * cosine;
    }
  }
  return answer;
}

void test_algorithm(std::vector<int> const& sizes, int groups, int lanes) {
  for (int n : sizes) {
    Problem const problem(n, n + 3);
    Answer const got = solve(problem, 0.3, groups, lanes);
    Answer const wanted = on_gradients(problem, 0.3);
    double const scale = *std::max_element(wanted.weights.begin(), wanted.weights.end());
    std::string const name = std::to_string(n) + " tasks on " + std::to_string(groups) + " x " + std::to_string(lanes);
    check(distance(got.weights, wanted.weights) <= 1e-11 * scale, "weights of " + name);
    check(distance(got.rho, wanted.rho) <= 1e-11, "averages of " + name);
  }
}

/// What is no task is passed over, without touching memory there.
void test_strange_orders(int groups, int lanes) {
  Problem const plain(5, 8);
  Problem strange = plain;
  strange.orders.clear();
  for (int64_t entry : plain.orders) {
    for (int64_t none : {int64_t{-1}, int64_t{5}, INT64_MIN, INT64_MAX}) strange.orders.push_back(none);
    strange.orders.push_back(entry);
  }
  Answer const got = solve(strange, 0.5, groups, lanes);
  Answer const wanted = solve(plain, 0.5, groups, lanes);
  check(got.weights == wanted.weights && got.rho == wanted.rho, "strange orders");
}

void test_non_finite(int groups, int lanes) {
  for (double bad : {double{NAN}, HUGE_VAL, -HUGE_VAL}) {
    Problem of_gram(4, 4);
    Problem of_rho = of_gram;
    of_gram.gram[6] = of_gram.gram[9] = bad;
    of_rho.rho[7] = bad;
    for (Problem const* problem : {&of_gram, &of_rho}) {
      Answer const answer = solve(*problem, 0.5, groups, lanes);
      for (double w : answer.weights) check(std::isnan(w), "non-finite");
      check(answer.rho[2] == problem->rho[2], "averages beside what is not finite");
    }
  }
}

}  // namespace

int main() {
  test_algorithm({1, 2, 3, 8, 40}, 1, 1);
  test_algorithm({1, 3, 16}, 1, 4);
  test_algorithm({1, 2, 7, 16}, 3, 2);
  test_strange_orders(1, 1);
  test_strange_orders(2, 3);
  test_non_finite(1, 1);
  test_non_finite(2, 2);
  return finish("gradvac");
}
