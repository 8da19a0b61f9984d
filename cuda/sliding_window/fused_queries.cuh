// The rows of queries in the fused backward: delta and dq (see backward_fused.cuh).
#pragma once

#include "sliding_window/fused_rings.cuh"

namespace based::cuda {

// A weight that is 0 leaves nothing of a finite factor; unless tiles are checked, what is not
// finite makes the sums NaN and the CTA start again. A pair (query, key) is visible if their
// distance is in [0, W). `distance` is that of element 0 of the lane; from there it falls (kDown)
// or rises along the columns, the other way along the rows.
template <bool kDown>
__device__ __forceinline__ void mask_group(float (&x)[32], int distance, int window) {
#pragma unroll
  for (int e = 0; e < 32; ++e) {
    const int column = e / 4 * 8 + e % 2, row = e / 2 % 2 * 8;
    const int at = kDown ? distance + row - column : distance - row + column;
    if (unsigned(at) >= unsigned(window)) x[e] = 0.0f;
  }
}

// Whether a block of keys that lies `behind` blocks behind the queries has pairs that are not
// visible.
__device__ __forceinline__ bool cut_by_window(int behind, int window) {
  return behind == 0 || behind * kGroupRows + kGroupRows - 1 >= window;
}

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
        if (cut_by_window(block - key, window)) {
          const int distance = (block - key) * kGroupRows + row - c;
          mask_group<true>(x, distance, window);
          if (checked) mask_group<true>(y, distance, window);
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
        const int distance = (block - key) * kGroupRows + row - c;
        const bool cut = cut_by_window(block - key, window);
        if (cut) mask_group<true>(x, distance, window);
#pragma unroll
        for (int e = 0; e < 32; ++e) y[e] = x[e] * (y[e] - delta[e / 2 % 2]);
        if (cut && checked) mask_group<true>(y, distance, window);
        uint32_t ds[4][4];
        group_operand<Element>(ds, y);
        sum.begin();
        sum.add(ds, shared.k(at.slot));
        mma_commit();
        sum.template wait<0>();
      }
      finite &= sum.all_finite();
      const float factors[2] = {scale, scale};
      sum.for_each_part([&](const auto& part, auto out, int column) {
        store_strip<Tile, decltype(out)::value>(part, factors, dq, block * kGroupRows + 16 * warp,
                                                column, head_dim, true,
                                                [&](int t) { return t < length; });
      });
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
