// The rows of keys in the fused backward: dk and dv (see backward_fused.cuh).
#pragma once

#include "sliding_window/backward_keys.cuh"
#include "sliding_window/fused_queries.cuh"

namespace based::cuda {

template <class Tile>
__device__ __forceinline__ bool compute_dk_dv(
    const FusedShared<Tile>& shared, const FusedRange& range, const SlidingWindowBackwardParams& p,
    const WindowSequence& seq, int h, const RowSource<typename Tile::Element>& dk,
    const RowSource<typename Tile::Element>& dv, int back, int head_dim, int window, float scale,
    bool checked, Cursor& at_k, Cursor& at_q) {
  using Element = typename Tile::Element;
  const int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
  const float log_scale = scale * kLog2E;
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
      mma_wait<1>(x);
      const float* lse = shared.lse(at.slot) + c;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 value = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (checked) x[4 * j + e] += shared.flags(at_k.slot)[16 * warp + g + e / 2 * 8];
          x[4 * j + e] = weight<Element>(x[4 * j + e], log_scale, e % 2 == 0 ? value.x : value.y);
        }
      }
      const int distance = (block - key) * kGroupRows + c - 16 * warp - g;
      const bool cut = cut_by_window(block - key, window);
      if (cut) mask_group<false>(x, distance, window);
      uint32_t weights[4][4], ds[4][4];
      group_operand<Element>(weights, x);
      mma_wait<0>(y);
      sum_v.begin();
      sum_v.add(weights, dout);
      mma_commit();
      shared.ready(at.slot).wait(at.phase);
      const float* delta = shared.delta(at.slot) + c;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 value = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          y[4 * j + e] = x[4 * j + e] * (y[4 * j + e] - (e % 2 == 0 ? value.x : value.y));
        }
      }
      if (cut && checked) mask_group<false>(y, distance, window);
      group_operand<Element>(ds, y);
      sum_k.begin();
      sum_k.add(ds, q);
      mma_commit();
      sum_v.template wait<0>();
      sum_k.template wait<0>();
      if (block == key) shared.empty_q(at.slot).arrive();
    }
    shared.empty_k(at_k.slot).arrive();
    at_k.advance(shared.key_slots);
    at_q.advance(shared.q_slots);

    finite &= sum_k.all_finite() && sum_v.all_finite();
    const auto store = [&](auto& sums, float factor, const auto& target) {
      const float factors[2] = {factor, factor};
      sums.for_each_part([&](const auto& part, auto out, int column) {
        store_strip<Tile, decltype(out)::value>(part, factors, target, strip, column, head_dim,
                                                true, [&](int s) { return s < seq.length; });
      });
    };
    store(sum_k, scale, dk);
    store(sum_v, 1.0f, dv);
  }
  return finite;
}

}  // namespace based::cuda
