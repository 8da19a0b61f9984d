// The second kernel of the sliding window's backward, over tiles of keys: dk and dv (see
// backward.cuh).
#pragma once

#include "sliding_window/backward.cuh"

namespace based::cuda {

__device__ __forceinline__ void cp_async_4(float* shared, const float* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

// x (16, kOut) <- factor times the gradient of the final ring for the keys s_warp ... that it
// holds.
template <class Element, int kOut>
__device__ __forceinline__ void start_from_final_ring(float (&x)[kOut / 8][4], float factor,
                                                      const TensorView& dfinal,
                                                      const WindowSequence& seq, int h, int s_warp,
                                                      int column, int64_t W, int head_dim) {
  const int l = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int s = s_warp + l / 4 + 8 * r;
    const bool held = s >= -seq.past && s >= seq.length - W && s < seq.length;
    const int64_t at = held ? (seq.ring_start + int64_t(s)) % W : 0;
    const Element* row = static_cast<const Element*>(dfinal.data) + seq.n * dfinal.stride[0] +
                         (at < 0 ? at + W : at) * dfinal.stride[1] + h * dfinal.stride[2];
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = column + 8 * j + l % 4 * 2 + i;
        x[j][2 * r + i] = held && c < head_dim ? factor * to_float(row[c]) : 0.0f;
      }
    }
  }
}

// The blocks behind the first `token_blocks` own the keys of the initial ring, ring_tiles tiles for
// every sequence that end at key -1.
template <class T>
__global__ void __launch_bounds__(WindowTraits<T, WindowPass::kKeys>::kThreads,
                                  WindowTraits<T, WindowPass::kKeys>::kBlocks)
    sliding_window_bwd_keys_kernel(const __grid_constant__ SlidingWindowBackwardParams p,
                                   const __grid_constant__ WindowLayout layout, float* deltas,
                                   int64_t token_blocks, int ring_tiles) {
  using Traits = WindowTraits<T, WindowPass::kKeys>;
  using Element = typename T::Element;
  constexpr int kStep = Traits::kStep, kOut = Traits::kOut;
  extern __shared__ __align__(16) char shared[];
  const Columns<Traits> columns = columns_of<Traits>(shared, layout);

  const bool in_ring = blockIdx.x >= token_blocks;
  const unsigned index = blockIdx.x - (in_ring ? token_blocks : 0);
  const unsigned heads = layout.heads, h = index % heads;
  TokenTile tile;
  if (in_ring) {
    tile.n = index / heads / ring_tiles;
    tile.first = (static_cast<int>(index / heads % ring_tiles) - ring_tiles) * layout.rows;
  } else {
    tile = token_tile(layout, index / heads);
  }
  const WindowSequence seq = window_sequence(layout, tile.n);
  const int V = layout.head_dim, s0 = tile.first;
  if (s0 >= seq.length && !in_ring) return;
  const int s_end = min(s0 + layout.rows, in_ring ? 0 : seq.length);
  const auto wanted = [&](int s) { return s < s_end && s >= -layout.ring_size; };

  __shared__ RowSource<Element> q, k, v, dout, dk, dv;
  __shared__ RowSource<float> lse_of, delta_of;
  const int computing_warps = blockDim.x / 32 - 1, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    q = row_source<Element>(p.q, seq, h);
    k = row_source<Element>(p.k, p.initial_k_cache, seq, h, layout.ring_size);
    v = row_source<Element>(p.v, p.initial_v_cache, seq, h, layout.ring_size);
    dout = row_source<Element>(p.dout, seq, h);
    dk = row_source<Element>(p.dk, p.dinitial_k_cache, seq, h, layout.ring_size);
    dv = row_source<Element>(p.dv, p.dinitial_v_cache, seq, h, layout.ring_size);
    lse_of = row_source<float>(p.lse, seq, h);
    delta_of = delta_source(deltas, layout, seq, h);
    columns.init(computing_warps);
  }
  __syncthreads();
  if (seq.bad) {
    for (int i = threadIdx.x; i < (s_end - s0) * V; i += blockDim.x) {
      if (!wanted(s0 + i / V)) continue;
      dk.row(s0 + i / V)[i % V] = from_float<Element>(not_a_number());
      dv.row(s0 + i / V)[i % V] = from_float<Element>(not_a_number());
    }
    return;
  }

  const Band band = {0, layout.window - 1, 0, seq.length - 1};
  const int t0 = s0 + ((band.first(s0) - s0) & ~15);
  const int last_strip = s0 + (s_end - 1 - s0) / kBlock * kBlock;
  const int last_column = band.last(last_strip + 15);
  const int count = last_column < t0 ? 0 : ((last_column - t0) >> 4) + kStep;
  if (warp == computing_warps) {
    const RowSource<Element> rQ = q, rDout = dout;
    const RowSource<float> vector = threadIdx.x % 32 < kBlock ? lse_of : delta_of;
    bool again = false;
    for (int before = 0, out0 = 0; out0 < T::kV; before += count) {
      columns.template produce<true, true>(
          before, count, layout.aligned, again, [&](int i, int stage) {
            const int t = t0 + i * kBlock, at = t + threadIdx.x % kBlock;
            load_block<T>(columns.x(stage), rQ, t, 0, band.upper, V, layout.aligned);
            load_block<T>(columns.y(stage), rDout, t, 0, band.upper, V, layout.aligned);
            cp_async_4(columns.lse(stage) + threadIdx.x % 32,  // delta lies behind
                       vector.row(at <= band.upper ? at : 0), at <= band.upper);
          });
      again = !again && any_in_block(false);
      if (!again) out0 += kOut;
    }
    return;
  }

  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
  Element* const sK = reinterpret_cast<Element*>(shared + warp * Traits::kWarpBytes);
  Element* const sV = sK + kBlock * T::kLd;
  const auto fetch = [&](int s_strip) {
    if (s_strip < s_end) {
      load_block<T>(sK, k, s_strip, -seq.past, band.upper, V, layout.aligned);
      load_block<T>(sV, v, s_strip, -seq.past, band.upper, V, layout.aligned);
    }
    cp_async_commit();
  };
  const float scale = static_cast<float>(p.scale);
  bool again = false;
  for (int before = 0, out0 = 0; out0 < T::kV; before += count) {
    bool finite = true;
    int released = before;
    fetch(s0 + warp * kBlock);
    for (int s_strip = s0 + warp * kBlock; s_strip < s_end; s_strip += computing_warps * kBlock) {
      const int s_next = s_strip + computing_warps * kBlock;
      const RowBand rows(band, s_strip, g);
      const Walk walk(band, s_strip, t0, kStep);
      const int keep = s_next < s_end ? min(Walk(band, s_next, t0, kStep).first, count) : count;
      columns.skip(released, before + min(walk.first, count));
      RowOperand<T, Traits::kRegisters> rK, rV;
      cp_async_wait<0>();
      __syncwarp();
      rK.load(sK);
      rV.load(sV);
      if constexpr (Traits::kRegisters) {
        __syncwarp();
        fetch(s_next);
      }

      float rDk[kOut / 8][4] = {}, rDv[kOut / 8][4] = {};  // (16, kOut): dk / scale, dv
      if (p.dfinal_k_cache.rank >= 0 && s_strip + 15 >= seq.length - p.window) {
        start_from_final_ring<Element, kOut>(rDk, 1.0f / scale, p.dfinal_k_cache, seq, h, s_strip,
                                             out0, p.window, V);
        start_from_final_ring<Element, kOut>(rDv, 1.0f, p.dfinal_v_cache, seq, h, s_strip, out0,
                                             p.window, V);
      }
#pragma unroll 1
      for (int step = 0; step < walk.steps; ++step) {
        const int block = walk.first + step * kStep, first = t0 + block * kBlock;
        int stage[kStep];
        const Element *sQ[kStep], *sDout[kStep];
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
          stage[b] = columns.wait(before + block + b);
          sQ[b] = columns.x(stage[b]), sDout[b] = columns.y(stage[b]);
        }
        float weights[kStep][2][4], dscores[kStep][2][4];  // of (key, query)
        mma_ABt<kStep>(weights, rK, sQ);
        mma_ABt<kStep>(dscores, rV, sDout);
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
          const int column = first + b * kBlock;
          if (again) add_flags(weights[b], columns.flags(stage[b]));
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int at = 8 * j + c;
            const float2 lse = *reinterpret_cast<const float2*>(columns.lse(stage[b]) + at);
            const float2 delta = *reinterpret_cast<const float2*>(columns.delta(stage[b]) + at);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& x = weights[b][j][e];
              float& ds = dscores[b][j][e];
              x = weight<Element>(x, scale * kLog2E, (e % 2 == 0 ? lse.x : lse.y) * kLog2E);
              ds = x * (ds - (e % 2 == 0 ? delta.x : delta.y));
            }
          }
          if (rows.cuts(column)) {
            rows.mask(weights[b], column + c, 0.0f);
            rows.mask(dscores[b], column + c, 0.0f);
          }
          mma_AB<T, kOut>(sDout[b] + out0, Weights<Element>(weights[b][0], weights[b][1]), rDv);
          mma_AB<T, kOut>(sQ[b] + out0, Weights<Element>(dscores[b][0], dscores[b][1]), rDk);
        }
        columns.release(released, before + min(block + kStep, keep));
      }

      finite &= all_finite(rDk) && all_finite(rDv);
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // slots that held no key
        if (s_strip + g + 8 * r >= -seq.past) continue;
#pragma unroll
        for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) rDk[j][i] = rDv[j][i] = 0.0f;
        }
      }
      const float scales[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
      store_strip<T, kOut>(rDk, scales, dk, s_strip, out0, V, layout.aligned, wanted);
      store_strip<T, kOut>(rDv, ones, dv, s_strip, out0, V, layout.aligned, wanted);
      if constexpr (!Traits::kRegisters) {
        __syncwarp();
        fetch(s_next);
      }
    }
    columns.skip(released, before + count);
    again = !again && any_in_block(!finite);
    if (!again) out0 += kOut;
  }
}

}  // namespace based::cuda
