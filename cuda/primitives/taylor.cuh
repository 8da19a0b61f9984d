// The rows of the 2nd-order Taylor map in rotation order.
#pragma once

#include <cstdint>

namespace based::cuda {

// Row f of phi as coefficient * (x_i or 1) * (x_j or 1); an index of -1 stands for the 1.
struct TaylorRow {
  float coefficient;
  int i, j;
};

// Row f for feature_dim D; `root` is sqrt(scale), which every x_i carries.
__host__ __device__ inline TaylorRow taylor_row(int f, int D, float root) {
  if (f == 0) return {1.0f, -1, -1};
  if (f <= D) return {root, f - 1, -1};
  if (f <= 2 * D) return {0.70710678118654752f * root * root, f - 1 - D, f - 1 - D};
  const unsigned product = f - 1 - 2 * D, width = D;
  const int rotation = product / width + 1, i = product % width;
  const int j = i + rotation;
  return {root * root, i, j < D ? j : j - D};
}

}  // namespace based::cuda
