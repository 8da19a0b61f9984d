// The rows of queries in the fused backward: delta and dq (see backward_fused.cuh).
#pragma once

#include "sliding_window/fused_rings.cuh"

namespace based::cuda {

// Which pairs of a block of 64 queries and one of 64 keys are visible: those whose distance is in
// [0, W). It depends on how many blocks the keys lie `behind` only; bit e is the lane's element e.
// kKeys: rows are keys, not queries.
//
// A weight that is 0 leaves nothing of a finite factor; unless tiles are checked, what is not
// finite makes the sums NaN and the CTA start again.
template <bool kKeys>
struct VisiblePairs {
  int back, window;
  uint32_t nearest, last_but_one, last;

  __device__ __forceinline__ VisiblePairs(int back, int window)
      : back(back),
        window(window),
        nearest(bits(0)),
        last_but_one(bits(back - 2)),
        last(bits(back - 1)) {}

  // x <- 0 where a pair is not visible.
  __device__ __forceinline__ void mask(float (&x)[32], int behind) const {
    const uint32_t seen = behind == 0 ? nearest : behind == back - 1 ? last : last_but_one;
#pragma unroll
    for (int e = 0; e < 32; ++e) x[e] = (seen & 1u << e) != 0 ? x[e] : 0.0f;
  }
  // Whether some pair is not.
  __device__ __forceinline__ bool cut(int behind) const {
    return behind == 0 || behind * kGroupRows + kGroupRows - 1 >= window;
  }

 private:
  __device__ __forceinline__ uint32_t bits(int behind) const {
    uint32_t seen = 0;
#pragma unroll
    for (int e = 0; e < 32; ++e) {
      const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 % 2 * 8;
      const int column = threadIdx.x % 4 * 2 + e / 4 * 8 + e % 2;
      const int distance = behind * kGroupRows + (kKeys ? column - row : row - column);
      if (unsigned(distance) < unsigned(window)) seen |= 1u << e;
    }
    return seen;
  }
};

// x <- p and y <- dout v^T of 64 queries and 64 keys.
template <class Tile>
__device__ __forceinline__ void query_weights(float (&x)[32], float (&y)[32],
                                              const FusedShared<Tile>& shared, int q_slot,
                                              int key_slot, const float (&lse)[2], float log_scale,
                                              bool checked) {
  mma_begin(x, y);
  group_mma_ABt(x, shared.q(q_slot), shared.k(key_slot));
  mma_commit();
  group_mma_ABt(y, shared.dout(q_slot), shared.v(key_slot));
  mma_commit();
  mma_wait<1>(x);
  if (checked) {
    const float* flags = shared.flags(key_slot) + threadIdx.x % 4 * 2;
#pragma unroll
    for (int e = 0; e < 32; ++e) x[e] += flags[e / 4 * 8 + e % 2];
  }
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    x[e] = weight<typename Tile::Element>(x[e], log_scale, lse[e / 2 % 2]);
  }
  mma_wait<0>(y);
}

// delta (kDelta), dq (kDq), or both, of block after block of queries.
template <bool kDelta, bool kDq, class Tile>
__device__ __forceinline__ bool compute_queries(const FusedShared<Tile>& shared,
                                                const FusedRange& range,
                                                const RowSource<typename Tile::Element>& dq,
                                                int back, int length, int head_dim, int window,
                                                float scale, bool checked, Cursor& at_k,
                                                Cursor& at_q) {
  using Element = typename Tile::Element;
  const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
  const int row = 16 * warp + g;
  const float log_scale = scale * kLog2E;
  const VisiblePairs<false> visible(back, window);
  bool finite = true;
#pragma unroll 1
  for (int block = range.first; block < range.all_last; ++block) {
    const int first_key = max(range.key_first, block - back + 1), q_slot = at_q.slot;
    shared.full_q(q_slot).wait(at_q.phase);
    const float lse[2] = {shared.lse(q_slot)[row], shared.lse(q_slot)[row + 8]};
    float delta[2] = {};
    if constexpr (kDelta) {
      float sums[2] = {};
      Cursor at = at_k;
#pragma unroll 1
      for (int key = first_key; key <= block; ++key, at.advance(shared.key_slots)) {
        shared.full_k(at.slot).wait(at.phase);
        float x[32], y[32];
        query_weights(x, y, shared, q_slot, at.slot, lse, log_scale, checked);
        if (visible.cut(block - key)) {
          visible.mask(x, block - key);
          if (checked) visible.mask(y, block - key);
        }
#pragma unroll
        for (int e = 0; e < 32; ++e) {
          sums[e / 2 % 2] += x[e];
          delta[e / 2 % 2] = fmaf(x[e], y[e], delta[e / 2 % 2]);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(sums[r]);
        delta[r] = quad_sum(delta[r]);
        delta[r] = sum > 0.0f ? delta[r] / sum : 0.0f;
        if (c == 0) shared.delta(q_slot)[row + 8 * r] = delta[r];
      }
      shared.ready(q_slot).arrive();
    }

    if (kDq && block < range.last) {
      if constexpr (!kDelta) {
        shared.ready(q_slot).wait(at_q.phase);
        delta[0] = shared.delta(q_slot)[row], delta[1] = shared.delta(q_slot)[row + 8];
      }
      GroupSums<Tile::kV> sum;
      sum.clear();
      Cursor at = at_k;
#pragma unroll 1
      for (int key = first_key; key <= block; ++key, at.advance(shared.key_slots)) {
        if constexpr (!kDelta) shared.full_k(at.slot).wait(at.phase);
        float x[32], y[32];
        query_weights(x, y, shared, q_slot, at.slot, lse, log_scale, checked);
        const bool cut = visible.cut(block - key);
        if (cut) visible.mask(x, block - key);
#pragma unroll
        for (int e = 0; e < 32; ++e) y[e] = x[e] * (y[e] - delta[e / 2 % 2]);
        if (cut && checked) visible.mask(y, block - key);
        uint32_t ds[4][4];
        group_operand<Element>(ds, y);
        sum.begin();
        sum.add(ds, shared.k(at.slot));
        mma_commit();
        sum.template wait<0>();
      }
      finite &= sum.all_finite();
      store_group<Tile>(sum, scale, scale, dq, block * kGroupRows + 16 * warp, length, head_dim);
    }
    shared.empty_q(q_slot).arrive();
    at_q.advance(shared.q_slots);
    if (block - back + 1 >= range.key_first) {
      shared.empty_k(at_k.slot).arrive();
      at_k.advance(shared.key_slots);
    }
  }
  for (int key = max(range.key_first, range.all_last - back + 1); key < range.all_last; ++key) {
    shared.full_k(at_k.slot).wait(at_k.phase);
    shared.empty_k(at_k.slot).arrive();
    at_k.advance(shared.key_slots);
  }
  return finite;
}

}  // namespace based::cuda
