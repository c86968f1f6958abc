// The min-norm solver against its specification, on one lane and on teams of threads.
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "fastmtl/min_norm.h"
#include "thread_team.h"

namespace {

using fastmtl::ThreadTeam;
using Vector = std::vector<double>;

/// A square matrix.
struct Gram {
  std::string name;
  int n;
  Vector entries;

  double operator()(int i, int j) const { return entries[i * n + j]; }
};

Gram gram_of(std::string const& name, int n, int width, Vector const& rows) {
  Gram gram{name + " T=" + std::to_string(n), n, Vector(n * n)};
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int k = 0; k < width; ++k) gram.entries[i * n + j] += rows[i * width + k] * rows[j * width + k];
    }
  }
  return gram;
}

/// The kinds of gradients that break solvers.
std::vector<Gram> zoo(int n) {
  std::mt19937_64 random(n);
  std::normal_distribution<double> normal;
  std::vector<Gram> all;
  auto add = [&](std::string const& name, int width, std::function<void(Vector&)> const& change) {
    Vector rows(n * width);
    for (double& x : rows) x = normal(random);
    change(rows);
    all.push_back(gram_of(name, n, width, rows));
  };
  int const m = n + 3;
  auto scale_row = [](Vector& rows, int width, int i, double factor) {
    for (int k = 0; k < width; ++k) rows[i * width + k] *= factor;
  };
  add("random", m, [](Vector&) {});
  add("rank deficient", n / 3 + 1, [](Vector&) {});
  add("tiny", m, [](Vector& rows) {
    for (double& x : rows) x *= 1e-15;
  });
  add("huge", m, [](Vector& rows) {
    for (double& x : rows) x *= 1e15;
  });
  add("all zero", m, [](Vector& rows) { std::fill(rows.begin(), rows.end(), 0.0); });
  add("zero row", m, [&](Vector& rows) { scale_row(rows, m, n / 2, 0); });
  add("dominating row", m, [&](Vector& rows) { scale_row(rows, m, 0, 1e6); });
  add("rows far apart", m, [&](Vector& rows) {
    for (int i = 0; i < n; ++i) scale_row(rows, m, i, i % 2 ? 1e12 : 1);
  });
  add("duplicates", m, [&](Vector& rows) {
    for (int i = 1; i < n; i += 2) std::copy_n(&rows[(i - 1) * m], m, &rows[i * m]);
  });
  add("opposite", m, [&](Vector& rows) {
    for (int i = 1; i < n; i += 2) {
      for (int k = 0; k < m; ++k) rows[i * m + k] = -1e3 * rows[(i - 1) * m + k];
    }
  });
  add("stationary", m, [&](Vector& rows) {
    for (int k = 0; k < m; ++k) {
      double mean = 0;
      for (int i = 0; i < n; ++i) mean += rows[i * m + k] / n;
      for (int i = 0; i < n; ++i) rows[i * m + k] -= mean;
    }
  });
  add("nearly parallel", m, [&](Vector& rows) {
    for (int i = n - 1; i >= 0; --i) {
      for (int k = 0; k < m; ++k) rows[i * m + k] = rows[k] + 1e-7 * rows[i * m + k];
    }
  });
  add("conflicting", m, [&](Vector& rows) {
    for (int i = n - 1; i >= 0; --i) {
      for (int k = 0; k < m; ++k) rows[i * m + k] = (i % 2 ? -1 : 1) * rows[k] + 0.05 * rows[i * m + k];
    }
  });
  add("ill-conditioned", m, [&](Vector& rows) {
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < m; ++k) rows[i * m + k] *= std::pow(10.0, -12.0 * k / m);
    }
  });
  return all;
}

/// The largest excess of the optimality condition, in units of the 1e-12 s_i it may have; infinite off the simplex.
double excess(Gram const& gram, Vector const& weights) {
  int const n = gram.n;
  std::vector<long double> image(n);
  long double norm = 0, length = 0, total = 0;
  for (int i = 0; i < n; ++i) {
    if (!(weights[i] >= 0)) return INFINITY;
    total += weights[i];
    for (int j = 0; j < n; ++j) image[i] += static_cast<long double>(gram(i, j)) * weights[j];
    norm += weights[i] * image[i];
    length += weights[i] * std::sqrt(static_cast<long double>(gram(i, i)));
  }
  if (std::fabs(total - 1) > 1e-14) return INFINITY;
  double worst = 0;
  for (int i = 0; i < n; ++i) {
    long double const above = (1 - 1e-6L) * norm - image[i];
    long double const allowed = 1e-12L * std::sqrt(static_cast<long double>(gram(i, i))) * length;
    if (above > 0) worst = std::max(worst, static_cast<double>(above / allowed));
  }
  return worst;
}

Vector solve(Gram const& gram, Vector const* warm = nullptr, int groups = 1, int lanes = 1) {
  Vector weights(gram.n, NAN);
  Vector workspace(fastmtl::min_norm_workspace(gram.n), NAN);
  auto run = [&](auto const& team) {
    fastmtl::min_norm(team, gram.n, gram.entries.data(), warm ? warm->data() : nullptr, weights.data(),
                      workspace.data());
  };
  if (groups * lanes == 1) {
    run(fastmtl::HostTeam{});
  } else {
    ThreadTeam::run(groups, lanes, run);
  }
  return weights;
}

void test_bound(std::vector<int> const& sizes, int groups, int lanes) {
  for (int n : sizes) {
    for (Gram const& gram : zoo(n)) {
      double const worst = excess(gram, solve(gram, nullptr, groups, lanes));
      check(worst <= 1, gram.name + " on " + std::to_string(groups * lanes) + " lanes: " + std::to_string(worst));
    }
  }
}

void test_warm_start(int groups, int lanes) {
  for (int n : {1, 2, 7}) {
    for (Gram const& gram : zoo(n)) {
      for (int kept = 0; kept <= n; kept += 2) {
        Vector warm(n, 0.0);
        for (int i = 0; i < kept; ++i) warm[i] = 1.0 / kept;
        check(excess(gram, solve(gram, &warm, groups, lanes)) <= 1, gram.name + " from a warm start");
      }
    }
  }
}

void test_non_finite(int groups, int lanes) {
  for (double poison : {NAN, INFINITY, -INFINITY}) {
    Gram gram = zoo(9).front();
    gram.entries[5 * 9 + 2] = gram.entries[2 * 9 + 5] = poison;
    Vector const weights = solve(gram, nullptr, groups, lanes);
    check(std::ranges::all_of(weights, [](double w) { return std::isnan(w); }), "non-finite G gives NaN weights");
  }
}

void test_zero_rows_share() {
  Vector const weights = solve({"two zero rows", 3, {0, 0, 0, 0, 1, 0, 0, 0, 0}});
  check(weights == Vector{0.5, 0, 0.5}, "zero rows share the weight");
}

void test_two_tasks_closed_form() {
  for (double cosine : {-1.0, -0.7, 0.0, 0.4, 0.95, 1.0}) {
    for (double length : {1e-12, 0.3, 1.0, 2.0, 1e12}) {
      double const cross = cosine * length;
      double const square = length * length;
      double const spread = 1 + square - 2 * cross;
      bool const same = spread == 0;
      double const first = same ? 0.5 : std::clamp((square - cross) / spread, 0.0, 1.0);
      double const tolerance = same ? 0.01 : 1e-10;
      Vector const weights = solve({"pair", 2, {1, cross, cross, square}});
      check(std::fabs(weights[0] - first) <= tolerance, "closed form of two tasks, cosine " + std::to_string(cosine));
    }
  }
}

/// Rounding coarser than float64's leaves matrices with negative eigenvalues.
void test_indefinite_ends_on_the_simplex() {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  for (int round = 0; round < 200; ++round) {
    int const n = 2 + round % 12;
    Gram gram = zoo(n)[round % 14];
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < i; ++j) gram.entries[i * n + j] = gram.entries[j * n + i] *= 1 + 1e-6 * normal(random);
    }
    double total = 0;
    bool nonnegative = true;
    for (double w : solve(gram)) {
      total += w;
      nonnegative = nonnegative && w >= 0;
    }
    check(nonnegative && std::fabs(total - 1) < 1e-14, gram.name + " with coarse rounding");
  }
}

/// Three long rows in balance, whose rounding makes the square of their sum negative, beside a short row.
void test_negative_square(int groups, int lanes) {
  double const square = 1e12;
  double const cross = -0.5 * square * (1 + 1e-7);
  Gram const gram{
      "negative square", 4, {square, cross, cross, 0, cross, square, cross, 0, cross, cross, square, 0, 0, 0, 0, 1}};
  Vector const weights = solve(gram, nullptr, groups, lanes);
  for (int i = 0; i < 3; ++i) check(std::fabs(weights[i] - 1.0 / 3) < 1e-9, "negative square");
}

/// From any feasible point, polishing ends with the gradient zero on what is left of the support.
void test_polish(int groups, int lanes) {
  for (Gram const& gram : zoo(10)) {
    int const n = gram.n;
    Vector const linear(n, 1.0);
    Vector scale(n);
    for (int i = 0; i < n; ++i) scale[i] = gram(i, i) > 0 ? 1 / std::sqrt(gram(i, i)) : 0;
    Vector memory(fastmtl::NonnegQpWork::storage(n), NAN);
    fastmtl::NonnegQp const qp{n, gram.entries.data(), scale.data(), linear.data(), 1, 1e-3};
    fastmtl::NonnegQpWork const work(memory.data(), n);
    for (int c = 0; c < n; ++c) {
      work.support[c] = c;
      work.member[c] = 1;
      work.point[c] = 1 + c;
      for (int r = c; r < n; ++r) work.factor.column(c)[r] = qp.entry(r, c);
    }
    auto polish = [&](auto const& team) {
      int count = fastmtl::factor(team, work.factor, n, qp.floor());
      fastmtl::detail::polish(team, qp, work, count);
    };
    ThreadTeam::run(groups, lanes, polish);
    for (int i = 0; i < n; ++i) {
      bool const settled = work.member[i] ? std::fabs(work.gradient[i]) < 1e-12 : work.point[i] == 0;
      check(work.point[i] >= 0 && settled, gram.name + " polished");
    }
  }
}

/// A factor that lost and gained a row is the factor of what is left.
void test_factor_updates(int groups, int lanes) {
  int const n = 9;
  Gram const gram = zoo(n).front();
  for (int gone = 0; gone < n; ++gone) {
    Vector memory(fastmtl::PackedLower::storage(n), NAN);
    fastmtl::PackedLower const factor{memory.data(), n};
    for (int c = 0; c < n; ++c) {
      for (int r = c; r < n; ++r) factor.column(c)[r] = gram(r, c);
    }
    Vector row(n);
    std::vector<int> order;
    for (int i = 0; i < n; ++i) {
      if (i != gone) order.push_back(i);
    }
    for (int p = 0; p < n - 1; ++p) row[p] = gram(order[p], gone);
    order.push_back(gone);
    ThreadTeam::run(groups, lanes, [&](ThreadTeam const& team) {
      fastmtl::factor(team, factor, n, 0.0);
      fastmtl::remove_row(team, factor, n, gone);
      fastmtl::solve_lower(team, factor, n - 1, row.data());
      double pivot = gram(gone, gone);
      for (int p = 0; p < n - 1; ++p) pivot -= row[p] * row[p];
      fastmtl::append_row(team, factor, n - 1, row.data(), pivot);
    });
    auto const entry = [&](int r, int c) { return r == c ? 1 / factor.column(c)[c] : factor.column(c)[r]; };
    for (int r = 0; r < n; ++r) {
      for (int c = 0; c <= r; ++c) {
        double product = 0;
        for (int k = 0; k <= c; ++k) product += entry(r, k) * entry(c, k);
        check(std::fabs(product - gram(order[r], order[c])) < 1e-12, "factor after updates");
      }
    }
  }
}

}  // namespace

int main() {
  test_bound({1, 2, 3, 5, 8, 16, 40, 64, 128}, 1, 1);
  test_bound({1, 3, 16}, 2, 2);
  test_bound({2, 9, 24}, 4, 8);
  test_warm_start(1, 1);
  test_warm_start(1, 4);
  test_non_finite(1, 1);
  test_non_finite(2, 2);
  test_zero_rows_share();
  test_two_tasks_closed_form();
  test_indefinite_ends_on_the_simplex();
  test_negative_square(1, 1);
  test_negative_square(1, 3);
  test_polish(1, 1);
  test_polish(2, 2);
  test_factor_updates(1, 1);
  test_factor_updates(2, 3);
  return finish("min_norm");
}
