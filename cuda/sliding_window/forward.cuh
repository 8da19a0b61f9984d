// Sliding-window attention, forward:
//   out_t = sum_s p_ts v_s / sum_s p_ts,   p_ts = e^(scale <q_t, k_s> - max),   0 <= t - s < W
//   lse_t = max + log sum_s p_ts
// A CTA takes a tile of queries of one head, its warps strips of 16 in turn; the keys pass by in
// blocks, a warp takes those that meet the band of its strip, a few at a time. Softmax is online.
// Products of 16-bit elements run in the tensor cores with float sums, p rounded to Element; the
// denominator sums the rounded p. float is multiplied in float.
#pragma once

#include "sliding_window/columns.cuh"

namespace based::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.69314718055994531f;

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

// e^(scale s - max) for c = scale log2 e and max in units of log2.
template <class Element>
__device__ __forceinline__ float weight(float s, float c, float max) {
  if constexpr (std::is_same_v<Element, float>) {
    return exp2_fast(__fmul_rn(s, c) - max);  // exactly 1 for the largest
  } else {
    return exp2_fast(fmaf(s, c, -max));
  }
}

// block (16, 16) += the flags of its columns.
__device__ __forceinline__ void add_flags(float (&block)[2][4], const float* flags) {
  const int c = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) block[j][i] += flags[8 * j + c + i % 2];
  }
}

template <class T>
__global__ void __launch_bounds__(WindowTraits<T, WindowPass::kForward>::kThreads,
                                  WindowTraits<T, WindowPass::kForward>::kBlocks)
    sliding_window_fwd_kernel(const __grid_constant__ SlidingWindowParams p,
                              const __grid_constant__ WindowLayout layout) {
  using Traits = WindowTraits<T, WindowPass::kForward>;
  using Element = typename T::Element;
  constexpr int kStep = Traits::kStep;
  extern __shared__ __align__(16) char shared[];
  const Columns<Traits> columns = columns_of<Traits>(shared, layout);

  const int h = blockIdx.x % layout.heads;
  const TokenTile tile = token_tile(layout, blockIdx.x / layout.heads);
  const WindowSequence seq = window_sequence(layout, tile.n);
  const int V = layout.head_dim, t0 = tile.first;
  if (t0 >= seq.length) return;
  const int t_end = min(t0 + layout.rows, seq.length);

  __shared__ RowSource<Element> q, k, v, out;
  __shared__ RowSource<float> lse;
  const int computing_warps = blockDim.x / 32 - 1, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    q = row_source<Element>(p.q, seq, h);
    k = row_source<Element>(p.k, p.initial_k_cache, seq, h, layout.ring_size);
    v = row_source<Element>(p.v, p.initial_v_cache, seq, h, layout.ring_size);
    out = row_source<Element>(p.out, seq, h);
    lse = row_source<float>(p.lse, seq, h);
    columns.init(computing_warps);
  }
  __syncthreads();
  if (seq.bad) {
    for (int i = threadIdx.x; i < (t_end - t0) * V; i += blockDim.x) {
      out.row(t0 + i / V)[i % V] = from_float<Element>(not_a_number());
      *lse.row(t0 + i / V) = not_a_number();
    }
    return;
  }

  const Band band = {layout.window - 1, 0, -seq.past, seq.length - 1};
  const int s0 = t0 + ((band.first(t0) - t0) & ~15);  // blocks of keys line up with the strips
  const int last_strip = t0 + (t_end - 1 - t0) / kBlock * kBlock;
  const int count = ((band.last(last_strip + 15) - s0) >> 4) + kStep;  // whole steps for everyone
  if (warp == computing_warps) {
    const RowSource<Element> rK = k, rV = v;
    bool again = false;
    for (int before = 0;; before = count) {
      columns.template produce<false, true>(
          before, count, layout.aligned, again, [&](int i, int stage) {
            const int s = s0 + i * kBlock;
            load_block<T>(columns.x(stage), rK, s, band.lower, band.upper, V, layout.aligned);
            load_block<T>(columns.y(stage), rV, s, band.lower, band.upper, V, layout.aligned);
          });
      if (again || !any_in_block(false)) return;
      again = true;
    }
  }

  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
  Element* const sQ = reinterpret_cast<Element*>(shared + warp * Traits::kWarpBytes);
  const auto fetch = [&](int t_strip) {
    if (t_strip < t_end) load_block<T>(sQ, q, t_strip, 0, band.upper, V, layout.aligned);
    cp_async_commit();
  };
  const float scale = static_cast<float>(p.scale) * kLog2E;
  bool again = false;
  for (int before = 0;; before = count) {
    bool finite = true;
    int released = before;
    fetch(t0 + warp * kBlock);
    for (int t_strip = t0 + warp * kBlock; t_strip < t_end; t_strip += computing_warps * kBlock) {
      const int t_next = t_strip + computing_warps * kBlock;
      const RowBand rows(band, t_strip, g);
      const Walk walk(band, t_strip, s0, kStep);
      const int keep = t_next < t_end ? Walk(band, t_next, s0, kStep).first : count;
      columns.skip(released, before + walk.first);
      RowOperand<T, Traits::kRegisters> rQ;
      cp_async_wait<0>();
      __syncwarp();
      rQ.load(sQ);
      if constexpr (Traits::kRegisters) {
        __syncwarp();
        fetch(t_next);
      }

      float rO[T::kV / 8][4] = {};          // (16, V), numerator
      float sums[4] = {};                   // [0], [2]: denominators of rows g, g + 8
      float max[2] = {-FLT_MAX, -FLT_MAX};  // of the scaled scores, in units of log2
#pragma unroll 1
      for (int step = 0; step < walk.steps; ++step) {
        const int block = walk.first + step * kStep, first = s0 + block * kBlock;
        int stage[kStep];
        const Element* sK[kStep];
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
          stage[b] = columns.wait(before + block + b);
          sK[b] = columns.x(stage[b]);
        }
        float s[kStep][2][4];
        mma_ABt<kStep>(s, rQ, sK);
        float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
          const int column = first + b * kBlock;
          if (again) add_flags(s[b], columns.flags(stage[b]));
          if (rows.cuts(column)) rows.mask(s[b], column + c, -INFINITY);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            largest[0] = fmaxf(largest[0], fmaxf(s[b][j][0], s[b][j][1]));
            largest[1] = fmaxf(largest[1], fmaxf(s[b][j][2], s[b][j][3]));
          }
        }
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float old = max[r];
          max[r] = fmaxf(old, __fmul_rn(quad_max(largest[r]), scale));
          shrink[r] = exp2_fast(old - max[r]);
        }
        if (__any_sync(0xffffffff, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
          sums[0] *= shrink[0], sums[2] *= shrink[1];
#pragma unroll
          for (int j = 0; j < T::kV / 8; ++j) {
            rO[j][0] *= shrink[0], rO[j][1] *= shrink[0];
            rO[j][2] *= shrink[1], rO[j][3] *= shrink[1];
          }
        }
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& x = s[b][j / 4][j % 4];
            x = weight<Element>(x, scale, max[j % 4 / 2]);
          }
          const Weights<Element> weights(s[b][0], s[b][1]);
          weights.add_row_sums(sums);
          mma_AB<T, T::kV>(columns.y(stage[b]), weights, rO);
        }
        columns.release(released, before + min(block + kStep, keep));
      }

      finite &= all_finite(rO);
      const float factors[2] = {1.0f / sums[0], 1.0f / sums[2]};
      store_strip<T, T::kV>(rO, factors, out, t_strip, 0, V, layout.aligned,
                            [&](int t) { return t < t_end; });
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int t = t_strip + g + 8 * r;
        if (c == 0 && t < t_end) *lse.row(t) = max[r] * kLn2 + logf(sums[2 * r]);
      }
      if constexpr (!Traits::kRegisters) {
        __syncwarp();
        fetch(t_next);
      }
    }
    columns.skip(released, before + count);
    if (again || !any_in_block(!finite)) return;
    again = true;
  }
}

// The final ring: the last W keys, each in its slot, 0 in slots never written; and the positions.
// One thread copies one chunk of 16 bytes of a row of both caches; the first N advance a position.
template <class Element>
__global__ void sliding_window_ring_kernel(const __grid_constant__ SlidingWindowParams p,
                                           const __grid_constant__ WindowLayout layout,
                                           int64_t count) {
  constexpr int kChunk = 16 / sizeof(Element);
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < layout.sequences) {
    const int64_t at = index * p.final_positions.stride[0];
    const int64_t position = layout.positions.data == nullptr ? 0 : layout.positions[index];
    const int64_t total = position + window_sequence(layout, index).length;
    if (p.final_positions.dtype == DType::kInt32) {
      static_cast<int32_t*>(p.final_positions.data)[at] = static_cast<int32_t>(total);
    } else {
      static_cast<int64_t*>(p.final_positions.data)[at] = total;
    }
  }
  if (index >= count) return;
  const int V = layout.head_dim, chunks = (V + kChunk - 1) / kChunk, c = index % chunks * kChunk;
  const int64_t W = p.window, row = index / chunks;
  const int h = row % layout.heads;
  const int64_t slot = row / layout.heads % W, n = row / layout.heads / W;
  const WindowSequence seq = window_sequence(layout, n);
  // The last key s < length with (ring_start + s) mod W = slot.
  const int64_t behind = (seq.ring_start + int64_t(seq.length) - 1 - slot) % W;
  const int64_t s = seq.length - 1 - (behind < 0 ? behind + W : behind);
  const auto copy = [&](const TensorView& to, const TensorView& tokens, const TensorView& ring) {
    Element* target = static_cast<Element*>(to.data) + n * to.stride[0] + slot * to.stride[1] +
                      h * to.stride[2] + c;
    const int width = min(kChunk, V - c);
    if (seq.bad || s < -seq.past) {
      const Element filler = from_float<Element>(seq.bad ? not_a_number() : 0.0f);
      for (int e = 0; e < width; ++e) target[e] = filler;
      return;
    }
    const auto source = row_source<Element>(tokens, ring, seq, h, layout.ring_size);
    const Element* from = source.row(static_cast<int>(s)) + c;
    if (layout.aligned) {
      *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int e = 0; e < width; ++e) target[e] = from[e];
    }
  };
  copy(p.final_k_cache, p.k, p.initial_k_cache);
  copy(p.final_v_cache, p.v, p.initial_v_cache);
}

}  // namespace based::cuda
