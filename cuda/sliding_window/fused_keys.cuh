// The rows of keys in the fused backward: dk and dv (see backward_fused.cuh).
#pragma once

#include "sliding_window/backward_keys.cuh"
#include "sliding_window/fused_queries.cuh"

namespace based::cuda {

// What the lane's columns of an accumulator have in common with a vector (64,).
__device__ __forceinline__ void load_columns(float2 (&x)[8], const float* vector) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    x[j] = *reinterpret_cast<const float2*>(vector + 8 * j + threadIdx.x % 4 * 2);
  }
}

template <class Tile>
__device__ __forceinline__ bool compute_dk_dv(
    const FusedShared<Tile>& shared, const FusedRange& range, const SlidingWindowBackwardParams& p,
    const WindowSequence& seq, int h, const RowSource<typename Tile::Element>& dk,
    const RowSource<typename Tile::Element>& dv, int back, int head_dim, int window, float scale,
    bool checked, Cursor& at_k, Cursor& at_q) {
  using Element = typename Tile::Element;
  const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4;
  const float log_scale = scale * kLog2E;
  const VisiblePairs<true> visible(back, window);
  bool finite = true;
#pragma unroll 1
  for (int key = range.key_first; key < range.all_last; ++key) {
    const Tile k = shared.k(at_k.slot), v = shared.v(at_k.slot);
    shared.full_k(at_k.slot).wait(at_k.phase);
    if (key < range.first || key >= range.last) {  // another CTA's
      shared.empty_k(at_k.slot).arrive();
      at_k.advance(shared.key_slots);
      if (key >= range.last) {
        shared.full_q(at_q.slot).wait(at_q.phase);
        shared.empty_q(at_q.slot).arrive();
        at_q.advance(shared.q_slots);
      }
      continue;
    }
    const int strip = key * kGroupRows + 16 * warp;
    GroupSums<Tile::kV> sum_k, sum_v;
    sum_k.clear(), sum_v.clear();
    if (p.dfinal_k_cache.rank >= 0 && strip + 15 >= seq.length - p.window) {
      const auto start = [&](auto& sums, float factor, const TensorView& dfinal) {
        sums.for_each_part([&](auto& part, auto out, int column) {
          start_from_final_ring<Element, decltype(out)::value>(part, factor, dfinal, seq, h, strip,
                                                               column, p.window, head_dim);
        });
      };
      start(sum_k, 1.0f / scale, p.dfinal_k_cache);
      start(sum_v, 1.0f, p.dfinal_v_cache);
    }
    const int last = min(key + back, range.all_last);
    Cursor at = at_q;
#pragma unroll 1
    for (int block = key; block < last; ++block, at.advance(shared.q_slots)) {
      shared.full_q(at.slot).wait(at.phase);
      const Tile q = shared.q(at.slot), dout = shared.dout(at.slot);
      float x[32], y[32];  // of (key, query)
      mma_begin(x, y);
      group_mma_ABt(x, k, q);
      mma_commit();
      group_mma_ABt(y, v, dout);
      mma_commit();
      float2 lse[8], delta[8];  // of the lane's columns
      load_columns(lse, shared.lse(at.slot));
      mma_wait<1>(x);
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const float2& value = lse[e / 4];
        x[e] = weight<Element>(x[e], log_scale, e % 2 == 0 ? value.x : value.y);
      }
      const bool cut = visible.cut(block - key);
      if (cut) visible.mask(x, block - key);
      uint32_t weights[4][4], ds[4][4];
      group_operand<Element>(weights, x);
      sum_v.begin();
      sum_v.add(weights, dout);
      mma_commit();
      shared.ready(at.slot).wait(at.phase);
      load_columns(delta, shared.delta(at.slot));
      mma_wait<1>(y);
#pragma unroll
      for (int e = 0; e < 32; ++e) {
        const float2& value = delta[e / 4];
        y[e] = x[e] * (y[e] - (e % 2 == 0 ? value.x : value.y));
      }
      if (cut && checked) visible.mask(y, block - key);
      group_operand<Element>(ds, y);
      sum_k.begin();
      sum_k.add(ds, q);
      mma_commit();
      sum_v.template wait<0>();
      sum_k.template wait<0>();
      if (block == key) shared.empty_q(at.slot).arrive();
    }
    // Of a key that was not finite nothing is left but NaN.
    float flags[2] = {};
    if (checked) {
      flags[0] = shared.flags(at_k.slot)[16 * warp + g];
      flags[1] = shared.flags(at_k.slot)[16 * warp + g + 8];
    }
    shared.empty_k(at_k.slot).arrive();
    at_k.advance(shared.key_slots);
    at_q.advance(shared.q_slots);

    finite &= sum_k.all_finite() && sum_v.all_finite();
    store_group<Tile>(sum_k, scale + flags[0], scale + flags[1], dk, strip, seq.length, head_dim);
    store_group<Tile>(sum_v, 1.0f + flags[0], 1.0f + flags[1], dv, strip, seq.length, head_dim);
  }
  return finite;
}

}  // namespace based::cuda
