// The 2nd-order Taylor map in rotation order, on feature-major tiles: x (D, kWidth) -> phi (F,
// kWidth), one token per column, so that every row operation vectorises over tokens. x already
// carries sqrt(scale).
#pragma once

#include <cstdint>

namespace based::cpu::BASED_ISA {

// body(row, i, j) for every product row: phi[row] = x_i x_j, i != j.
template <class BodyFn>
inline void for_each_product(int64_t feature_dim, const BodyFn& body) {
  int64_t row = 1 + 2 * feature_dim;
  for (int64_t r = 1; r <= feature_dim / 2; ++r) {
    const int64_t count = 2 * r == feature_dim ? r : feature_dim;
    for (int64_t j = 0; j < count; ++j)
      body(row++, j, j + r < feature_dim ? j + r : j + r - feature_dim);
  }
}

constexpr double kInvSqrt2 = 0.70710678118654752440;

template <class T, int kWidth>
void taylor_tile(int64_t feature_dim, const T* __restrict x, T* __restrict phi) {
  for (int t = 0; t < kWidth; ++t) phi[t] = T(1);
  for (int64_t j = 0; j < feature_dim; ++j) {
    const T* xj = x + j * kWidth;
    T* linear = phi + (1 + j) * kWidth;
    T* square = phi + (1 + feature_dim + j) * kWidth;
    for (int t = 0; t < kWidth; ++t) linear[t] = xj[t];
    for (int t = 0; t < kWidth; ++t) square[t] = xj[t] * xj[t] * T(kInvSqrt2);
  }
  for_each_product(feature_dim, [&](int64_t row, int64_t i, int64_t j) {
    const T *xi = x + i * kWidth, *xj = x + j * kWidth;
    T* out = phi + row * kWidth;
    for (int t = 0; t < kWidth; ++t) out[t] = xi[t] * xj[t];
  });
}

// dx (D, kWidth) = the gradient through taylor_tile of dphi (F, kWidth).
template <class T, int kWidth>
void taylor_tile_backward(int64_t feature_dim, const T* __restrict x, const T* __restrict dphi,
                          T* __restrict dx) {
  for (int64_t j = 0; j < feature_dim; ++j) {
    const T *xj = x + j * kWidth, *linear = dphi + (1 + j) * kWidth;
    const T* square = dphi + (1 + feature_dim + j) * kWidth;
    T* out = dx + j * kWidth;
    for (int t = 0; t < kWidth; ++t) out[t] = linear[t] + T(2 * kInvSqrt2) * xj[t] * square[t];
  }
  for_each_product(feature_dim, [&](int64_t row, int64_t i, int64_t j) {
    const T *xi = x + i * kWidth, *xj = x + j * kWidth, *g = dphi + row * kWidth;
    T *dxi = dx + i * kWidth, *dxj = dx + j * kWidth;
    for (int t = 0; t < kWidth; ++t) dxi[t] += g[t] * xj[t];
    for (int t = 0; t < kWidth; ++t) dxj[t] += g[t] * xi[t];
  });
}

}  // namespace based::cpu::BASED_ISA
