// The Taylor map by its definition, one vector at a time in double.
#pragma once

#include "testing.h"

namespace based::testing {

// One row of phi: coefficient * x_i * x_j, a factor with index -1 left out. x carries sqrt(scale).
struct TaylorRow {
  double coefficient;
  int64_t i, j;
};

inline std::vector<TaylorRow> taylor_rows(int64_t D) {
  std::vector<TaylorRow> rows = {{1, -1, -1}};
  for (int64_t j = 0; j < D; ++j) rows.push_back({1, j, -1});
  for (int64_t j = 0; j < D; ++j) rows.push_back({std::sqrt(0.5), j, j});
  for (int64_t r = 1; r <= D / 2; ++r) {
    const bool both_ways = 2 * r == D;  // (j, j + r) and (j + r, j) are the same pair
    for (int64_t j = 0; j < (both_ways ? r : D); ++j) rows.push_back({1, j, (j + r) % D});
  }
  return rows;
}

inline Values taylor_map(const double* x, int64_t D, double scale) {
  const auto factor = [&](int64_t i) { return i < 0 ? 1 : std::sqrt(scale) * x[i]; };
  Values phi;
  for (const TaylorRow& row : taylor_rows(D)) {
    phi.push_back(row.coefficient * factor(row.i) * factor(row.j));
  }
  return phi;
}

// dx += the gradient of <dphi, phi(x)>.
inline void add_taylor_gradient(const double* x, int64_t D, double scale, const double* dphi,
                                double* dx) {
  const double root = std::sqrt(scale);
  const auto factor = [&](int64_t i) { return i < 0 ? 1 : root * x[i]; };
  const std::vector<TaylorRow> rows = taylor_rows(D);
  for (size_t f = 0; f < rows.size(); ++f) {
    const auto [coefficient, i, j] = rows[f];
    if (i >= 0) dx[i] += dphi[f] * coefficient * root * factor(j);
    if (j >= 0) dx[j] += dphi[f] * coefficient * root * factor(i);
  }
}

}  // namespace based::testing
