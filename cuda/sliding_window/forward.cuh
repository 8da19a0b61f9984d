// Sliding-window attention, forward:
//   out_t = sum_s p_ts v_s / sum_s p_ts,   p_ts = e^(scale <q_t, k_s> - max),   0 <= t - s < W
//   lse_t = max + log sum_s p_ts
// A CTA takes a tile of queries of one head, a warp 16 of them; the keys that any query of the tile
// sees pass by in tiles, a warp takes the 16-key blocks that meet its own band. Softmax is online.
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

// block (16, 16) += the flags of its columns, from the lane's own on.
__device__ __forceinline__ void add_flags(float (&block)[2][4], const float* flags) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) block[j][i] += flags[8 * j + i % 2];
  }
}

template <class T>
__global__ void __launch_bounds__(WindowTraits<T, WindowPass::kForward>::kThreads,
                                  WindowTraits<T, WindowPass::kForward>::kBlocks)
    sliding_window_fwd_kernel(const __grid_constant__ SlidingWindowParams p,
                              const __grid_constant__ WindowLayout layout) {
  using Traits = WindowTraits<T, WindowPass::kForward>;
  using Element = typename T::Element;
  constexpr int kColumns = Traits::kColumns;
  extern __shared__ __align__(16) char shared[];
  const Columns<Traits> columns = columns_of<Traits>(shared);

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
  const int s0 = t0 + ((band.first(t0) - t0) & ~15);  // blocks of keys line up with the queries
  const int tiles = (t_end - s0 + kColumns - 1) / kColumns;
  if (warp == computing_warps) {
    bool again = false;
    for (int before = 0;; before = tiles) {
      columns.template produce<false, true>(
          before, tiles, layout.aligned, again, [&](int i, int stage) {
            const int s = s0 + i * kColumns;
            load_rows<T>(columns.x(stage), kColumns, k, s, band.lower, band.upper, V,
                         layout.aligned);
            load_rows<T>(columns.y(stage), kColumns, v, s, band.lower, band.upper, V,
                         layout.aligned);
          });
      if (again || !__syncthreads_or(false)) return;
      again = true;
    }
  }

  const int l = threadIdx.x % 32, g = l / 4, c = l % 4 * 2;
  const int t_warp = t0 + warp * 16;  // the warp's first row
  Element* const sQ = reinterpret_cast<Element*>(shared + warp * Traits::kWarpBytes);  // later out
  load_rows<T>(sQ, 16, q, t_warp, 0, band.upper, V, layout.aligned);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  RowOperand<T, Traits::kRegisters> rQ;
  rQ.load(sQ);

  float rO[T::kV / 8][4] = {};  // (16, V), numerator
  float sums[4] = {};           // [0], [2]: denominators of rows g, g + 8
  float max[2] = {};            // of the scaled scores, in units of log2
  const float scale = static_cast<float>(p.scale) * kLog2E;
  const RowBand rows(band, t_warp, g);
  const auto body = [&](int i, int stage, const float* flags) {
    const int first = s0 + i * kColumns;
    if (first > rows.last || first + kColumns <= rows.first) return;
    float s[kColumns / 8][4];
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int b = 0; b < kColumns / 16; ++b) {
      const int s_block = first + 16 * b;
      if (!rows.meets(s_block)) continue;
      float (&block)[2][4] = reinterpret_cast<float (&)[2][4]>(s[2 * b]);
#pragma unroll
      for (int j = 0; j < 8; ++j) block[j / 4][j % 4] = 0.0f;
      mma_ABt<2>(block, rQ, columns.x(stage) + 16 * b * T::kLd);
      if (flags != nullptr) add_flags(block, flags + 16 * b + c);
      if (rows.cuts(s_block)) rows.mask(block, s_block + c, -INFINITY);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        largest[0] = fmaxf(largest[0], fmaxf(block[j][0], block[j][1]));
        largest[1] = fmaxf(largest[1], fmaxf(block[j][2], block[j][3]));
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
    for (int b = 0; b < kColumns / 16; ++b) {
      if (!rows.meets(first + 16 * b)) continue;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float& x = s[2 * b + j / 4][j % 4];
        x = weight<Element>(x, scale, max[j % 4 / 2]);
      }
      const Weights<Element> weights(s[2 * b], s[2 * b + 1]);
      weights.add_row_sums(sums);
      mma_AB<T, T::kV>(columns.y(stage) + 16 * b * T::kLd, weights, rO);
    }
  };
  bool again = false;
  for (int before = 0;; before = tiles) {
#pragma unroll
    for (int j = 0; j < T::kV / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rO[j][i] = 0.0f;
    }
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
    max[0] = max[1] = -FLT_MAX;
    columns.consume(before, tiles, again, body);
    if (again || !__syncthreads_or(t_warp < t_end && !all_finite(rO))) break;
    again = true;
  }

  stage_rows<T, T::kV>(sQ, rO, 1.0f / sums[0], 1.0f / sums[2]);
  __syncwarp();
  store_rows<T>(sQ, out, t_warp, V, layout.aligned, [&](int t) { return t < t_end; });
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int t = t_warp + g + 8 * r;
    if (c == 0 && t < t_end) *lse.row(t) = max[r] * kLn2 + logf(sums[2 * r]);
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
