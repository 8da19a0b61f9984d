// u, delta and r in the kernels with roles (sm_90a).
#pragma once

#include "linear_attention/gradients.cuh"
#include "linear_attention/roles.cuh"

namespace based::cuda::linear {

// The tile of dout becomes u = dout / den times unit, rounded; sDelta: delta times unit, in fp32.
template <class Element, class Tile>
__device__ __forceinline__ void scale_span(int thread, Tile& tile, float* sDelta, float2 scalars,
                                           float unit) {
  const int row = thread % kSpan;
#pragma unroll
  for (int i = 0; i < kTileV / 8 / 2; ++i) {
    char* at = tile.at(row, thread / kSpan * (kTileV / 8 / 2) + i);
    uint4 x = *reinterpret_cast<const uint4*>(at);
    uint32_t* words = reinterpret_cast<uint32_t*>(&x);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float2 value = unpack<Element>(words[w]);
      words[w] = pack<Element>(value.x * (scalars.x * unit), value.y * (scalars.x * unit));
    }
    *reinterpret_cast<uint4*>(at) = x;
  }
  if (thread < kSpan) sDelta[row] = scalars.y * unit;
}

// 1 / den and delta of the thread's row of a chunk, of which n rows exist.
__device__ __forceinline__ float2 span_scalars(int thread, const Arguments& a, const Segment& seg,
                                               int tile, int head, int64_t t, int n) {
  const int row = thread % kSpan;
  if (row >= n) return {0.0f, 0.0f};
  if (!a.normalize) return {1.0f, 0.0f};
  const int64_t index = token_index(a, seg, tile, head, t + row);
  return {a.inverse_den[index], a.delta[index]};
}

// r = sum_t delta_t phi(q_t) of a warpgroup: the moments, and the constant's sum, which the lanes
// of the warp behind theirs all hold.
template <class Tr>
struct WeightedSums : Moments<Tr> {
  float constant = 0;
  using Moments<Tr>::Moments;

  __device__ __forceinline__ bool has_constant() const { return this->warp == this->kSumWarp + 1; }

  template <class Tile>
  __device__ __forceinline__ void update(int lane, const Tile& sQ, const float* sDelta) {
    this->update_weighted(lane, sQ, sDelta);
    if (!has_constant()) return;
    float sum = sDelta[lane] + sDelta[lane + 32];
#pragma unroll
    for (int i = 1; i < 32; i *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    constant += sum;
  }

  // fn(feature, sum&) for each that a lane holds.
  template <class Fn>
  __device__ __forceinline__ void for_all(int lane, const Fn& fn) {
    this->for_each(fn);
    if (has_constant() && lane == 0) fn(Tr::kConstant, constant);
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (float& x : this->sum) x *= factor;
    constant *= factor;
  }
};

}  // namespace based::cuda::linear
