// The Taylor feature map and its gradient. Memory-bound: a row of D elements becomes one of
// F = 1 + D + D(D+1)/2, so the time is that of writing (forward) or reading (backward) F elements.
#pragma once

#include <cstdint>

#include "based/types.h"
#include "primitives/element.cuh"
#include "primitives/taylor.cuh"

namespace based::cuda {

constexpr int kRowsPerBlock = 32;

// A (..., width) tensor as rows: three leading sizes and strides (missing ones are size 1).
struct Rows {
  void* data;
  int64_t size[3], stride[3];
};

__device__ __forceinline__ int64_t row_offset(const Rows& rows, int64_t index) {
  const int64_t c = index % rows.size[2], rest = index / rows.size[2];
  return c * rows.stride[2] + rest % rows.size[1] * rows.stride[1] +
         rest / rows.size[1] * rows.stride[0];
}

// out[row, f] = phi_f(x[row]). A block takes kRowsPerBlock rows; a thread keeps its f, hence its
// pair (i, j), and walks the rows, so that a warp writes 32 neighbouring elements. Products in
// float.
template <class Element>
__global__ void taylor_feature_map_fwd_kernel(Rows x, Rows out, int64_t rows, int D, int F,
                                              float root) {
  __shared__ int64_t s_x[kRowsPerBlock], s_out[kRowsPerBlock];
  const int64_t first = int64_t(blockIdx.x) * kRowsPerBlock;
  const int count = static_cast<int>(min(int64_t(kRowsPerBlock), rows - first));
  for (int r = threadIdx.x; r < count; r += blockDim.x) {
    s_x[r] = row_offset(x, first + r);
    s_out[r] = row_offset(out, first + r);
  }
  __syncthreads();
  for (int f = threadIdx.x; f < F; f += blockDim.x) {
    const TaylorRow phi = taylor_row(f, D, root);
    for (int r = 0; r < count; ++r) {
      const Element* gX = static_cast<const Element*>(x.data) + s_x[r];
      float value = phi.coefficient;
      if (phi.i >= 0) value *= to_float(gX[phi.i]);
      if (phi.j >= 0) value *= to_float(gX[phi.j]);
      static_cast<Element*>(out.data)[s_out[r] + f] = from_float<Element>(value);
    }
  }
}

// dx[row, j] = sum over the rows of phi that contain x_j. One thread per (row, j): neighbouring
// threads read neighbouring elements of dout, each element twice (once for either factor).
template <class Element>
__global__ void taylor_feature_map_bwd_kernel(Rows dout, Rows x, Rows dx, int64_t rows, int D,
                                              float root) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = index / D;
  const int j = static_cast<int>(index % D);
  if (row >= rows) return;
  const Element* gX = static_cast<const Element*>(x.data) + row_offset(x, row);
  const Element* gD = static_cast<const Element*>(dout.data) + row_offset(dout, row);
  // d/dx_j of root x_j and of (root x_j)^2 / sqrt(2)
  float quadratic = 1.41421356237309505f * to_float(gX[j]) * to_float(gD[1 + D + j]);
  for (int r = 1; r <= D / 2; ++r) {
    const Element* gR = gD + 1 + 2 * D + (r - 1) * D;  // the products x_i x_{(i+r) mod D}
    const int next = j + r < D ? j + r : j + r - D, previous = j >= r ? j - r : j - r + D;
    const bool half = 2 * r == D;  // keeps i < D/2 only: x_j has one partner here, not two
    if (!half || j < r) quadratic += to_float(gR[j]) * to_float(gX[next]);
    if (!half || j >= r) quadratic += to_float(gR[previous]) * to_float(gX[previous]);
  }
  const float gradient = root * to_float(gD[1 + j]) + root * root * quadratic;
  static_cast<Element*>(dx.data)[row_offset(dx, row) + j] = from_float<Element>(gradient);
}

}  // namespace based::cuda
