// Sliding-window attention, backward. With p_ts = e^(scale <q_t, k_s> - lse_t), delta_t = <dout_t,
// out_t> and ds_ts = p_ts (<dout_t, v_s> - delta_t):
//   dq_t = scale sum_s ds_ts k_s,   dk_s = scale sum_t ds_ts q_t,   dv_s = sum_t p_ts dout_t
// The rounding of out puts an error e_t into delta_t, which takes e_t sum_s p_ts k_s from dq_t and
// e_t p_ts q_t from dk_s: much when v has a mean. The exact sum_s ds_ts is 0, so what it comes to is
// e_t: dq_t is corrected, and delta_t + e_t is kept for the keys.
//
// Two kernels recompute p, first over tiles of queries for dq and delta, then over tiles of keys for
// dk and dv; keys of the initial ring have tiles of their own. Every gradient is written once, so
// the result does not depend on how CTAs are scheduled. Products as in the forward, with p and ds
// rounded to Element; the sum of ds is that of the unrounded ones.
#pragma once

#include "sliding_window/forward.cuh"

namespace based::cuda {

// Accumulators of rows row0 ... that are `wanted`, columns column ... of the target.
template <class T, int kOut, class WantedFn>
__device__ __forceinline__ void store_accumulators(const float (&x)[kOut / 8][4],
                                                   const RowSource<typename T::Element>& target,
                                                   int row0, int column, int head_dim,
                                                   const WantedFn& wanted) {
  const int l = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + l / 4 + 8 * r;
    if (!wanted(row)) continue;
    typename T::Element* to = target.row(row);
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = column + 8 * j + l % 4 * 2 + i;
        if (c < head_dim) to[c] = from_float<typename T::Element>(x[j][2 * r + i]);
      }
    }
  }
}

__device__ __forceinline__ RowSource<float> delta_source(float* deltas, const WindowLayout& layout,
                                                         const WindowSequence& seq, int h) {
  return {deltas + (seq.batch * layout.seqlen + seq.begin) * layout.heads + h, layout.heads,
          nullptr, 0, 0, 0};
}

// deltas (B, T, H) <- delta_t + e_t.
template <class T>
__global__ void __launch_bounds__(WindowTraits<T, WindowPass::kQueries>::kThreads,
                                  WindowTraits<T, WindowPass::kQueries>::kBlocks)
    sliding_window_bwd_queries_kernel(const __grid_constant__ SlidingWindowBackwardParams p,
                                      const __grid_constant__ WindowLayout layout, float* deltas) {
  using Traits = WindowTraits<T, WindowPass::kQueries>;
  using Element = typename T::Element;
  constexpr int kColumns = Traits::kColumns, kOut = Traits::kOut;
  extern __shared__ __align__(16) char shared[];
  const int rows = layout.rows;
  Element* const sQ = reinterpret_cast<Element*>(shared);  // (rows, kV), later dq
  Element* const sDout = sQ + rows * T::kLd;               // (rows, kV)
  const Columns<Traits> columns = columns_of<Traits>(shared);

  const int h = blockIdx.x % layout.heads;
  const TokenTile tile = token_tile(layout, blockIdx.x / layout.heads);
  const WindowSequence seq = window_sequence(layout, tile.n);
  const int V = layout.head_dim, t0 = tile.first;
  if (t0 >= seq.length) return;
  const int t_end = min(t0 + rows, seq.length);

  const int l = threadIdx.x % 32, g = l / 4, c = l % 4 * 2;
  const int r0 = threadIdx.x / 32 * 16, t_warp = t0 + r0;
  __shared__ RowSource<Element> k, v, dq;
  __shared__ RowSource<float> delta_of;
  if (threadIdx.x == 0) {
    k = row_source<Element>(p.k, p.initial_k_cache, seq, h, layout.ring_size);
    v = row_source<Element>(p.v, p.initial_v_cache, seq, h, layout.ring_size);
    dq = row_source<Element>(p.dq, seq, h);
    delta_of = delta_source(deltas, layout, seq, h);
  }
  __syncthreads();
  if (seq.bad) {
    for (int i = threadIdx.x; i < (t_end - t0) * V; i += blockDim.x) {
      dq.row(t0 + i / V)[i % V] = from_float<Element>(not_a_number());
      *delta_of.row(t0 + i / V) = not_a_number();
    }
    return;
  }

  const Band band = {layout.window - 1, 0, -seq.past, seq.length - 1};
  const int s0 = t0 + ((band.first(t0) - t0) & ~15);
  const int tiles = (t_end - s0 + kColumns - 1) / kColumns;
  const auto load = [&](int i) {
    const int s = s0 + i * kColumns;
    load_tile<T>(columns.x(i), kColumns, k, s, band.lower, band.upper, V, layout.aligned);
    load_tile<T>(columns.y(i), kColumns, v, s, band.lower, band.upper, V, layout.aligned);
  };
  load_tile<T>(sQ, rows, row_source<Element>(p.q, seq, h), t0, 0, band.upper, V, layout.aligned);
  load_tile<T>(sDout, rows, row_source<Element>(p.dout, seq, h), t0, 0, band.upper, V,
               layout.aligned);

  RowOperand<T, Traits::kRegisters> rQ, rDout;
  float lse[2] = {}, delta[2] = {};
  const float scale = static_cast<float>(p.scale);
  const auto read_rows = [&] {
    rQ.load(sQ + r0 * T::kLd);
    rDout.load(sDout + r0 * T::kLd);
    const auto out = row_source<Element>(p.out, seq, h);
    const auto gLse = row_source<float>(p.lse, seq, h);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = t_warp + g + 8 * r;
      if (t < t_end) {
        lse[r] = *gLse.row(t) * kLog2E;
        const Element* x = out.row(t);
        const Element* y = sDout + (r0 + g + 8 * r) * T::kLd;
        for (int i = l % 4 * T::kChunk; i < V; i += 4 * T::kChunk) {
          if (layout.aligned) {
            const uint4 chunk = *reinterpret_cast<const uint4*>(x + i);
            const Element* elements = reinterpret_cast<const Element*>(&chunk);
#pragma unroll
            for (int e = 0; e < T::kChunk; ++e) {
              delta[r] = fmaf(to_float(elements[e]), to_float(y[i + e]), delta[r]);
            }
          } else {
            for (int e = i; e < min(V, i + T::kChunk); ++e) {
              delta[r] = fmaf(to_float(x[e]), to_float(y[e]), delta[r]);
            }
          }
        }
      }
      delta[r] = quad_sum(delta[r]);
    }
  };

  for (int out0 = 0; out0 < T::kV; out0 += kOut) {  // once, unless head_dim is large
    if (out0 > 0) __syncthreads();
    float rDq[kOut / 8][4] = {}, rMean[kOut / 8][4] = {};  // (16, kOut): dq / scale, sum_s p_ts k_s
    float error[2] = {};
    columns.template for_each<true, false>(tiles, load, [&](int i, const float* flags) {
      if (i == 0 && out0 == 0) read_rows();
#pragma unroll
      for (int b = 0; b < kColumns / 16; ++b) {
        const int s_block = s0 + i * kColumns + 16 * b;
        if (s_block > band.last(t_warp + 15) || s_block + 15 < band.first(t_warp)) continue;
        const Element* sK = columns.x(i) + 16 * b * T::kLd;
        float weights[2][4] = {}, dscores[2][4] = {};
        mma_ABt<2>(weights, rQ, sK);
        mma_ABt<2>(dscores, rDout, columns.y(i) + 16 * b * T::kLd);
        if (flags != nullptr) {
          add_flags(weights[0], flags + 16 * b + c);
          add_flags(weights[1], flags + 16 * b + 8 + c);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& x = weights[j / 4][j % 4];
          x = weight<Element>(x, scale * kLog2E, lse[j % 4 / 2]);
          dscores[j / 4][j % 4] = x * (dscores[j / 4][j % 4] - delta[j % 4 / 2]);
        }
        if (s_block < band.first(t_warp + 15) || s_block + 15 > band.last(t_warp)) {
          const int row = t_warp + g;
          const int low[2] = {band.first(row) - s_block, band.first(row + 8) - s_block};
          const int high[2] = {band.last(row) - s_block, band.last(row + 8) - s_block};
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            mask(weights[j], c + 8 * j, low, high, 0.0f);
            mask(dscores[j], c + 8 * j, low, high, 0.0f);
          }
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) error[j % 4 / 2] += dscores[j / 4][j % 4];
        mma_AB<T, kOut>(sK + out0, Weights<Element>(dscores[0], dscores[1]), rDq,
                        Weights<Element>(weights[0], weights[1]), rMean);
      }
    });

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      error[r] = quad_sum(error[r]);
      const int t = t_warp + g + 8 * r;
      if (c == 0 && out0 == 0 && t < t_end) *delta_of.row(t) = delta[r] + error[r];
    }
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rDq[j][i] = (rDq[j][i] - error[i / 2] * rMean[j][i]) * scale;
    }
    const auto wanted = [&](int t) { return t < t_end; };
    if constexpr (Traits::kRegisters) {
      __syncwarp();
      stage_rows<T, kOut>(sQ + r0 * T::kLd, rDq, 1.0f, 1.0f);
      __syncwarp();
      store_rows<T>(sQ + r0 * T::kLd, dq, t_warp, V, layout.aligned, wanted);
    } else {
      store_accumulators<T, kOut>(rDq, dq, t_warp, out0, V, wanted);
    }
  }
}

__device__ __forceinline__ void cp_async_4(float* shared, const float* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}

// x (16, kOut) += the gradient of the final ring for the keys s_warp ... that it holds.
template <class Element, int kOut>
__device__ __forceinline__ void add_final_ring(float (&x)[kOut / 8][4], const TensorView& dfinal,
                                               const WindowSequence& seq, int h, int s_warp,
                                               int column, int64_t W, int head_dim) {
  const int l = threadIdx.x % 32;
  if (dfinal.rank < 0 || s_warp + 15 < seq.length - W) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int s = s_warp + l / 4 + 8 * r;
    if (s < -seq.past || s < seq.length - W || s >= seq.length) continue;
    const int64_t at = (seq.ring_start + int64_t(s)) % W;
    const Element* row = static_cast<const Element*>(dfinal.data) + seq.n * dfinal.stride[0] +
                         (at < 0 ? at + W : at) * dfinal.stride[1] + h * dfinal.stride[2];
#pragma unroll
    for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = column + 8 * j + l % 4 * 2 + i;
        if (c < head_dim) x[j][2 * r + i] += to_float(row[c]);
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
                                   const __grid_constant__ WindowLayout layout,
                                   float* deltas, int64_t token_blocks, int ring_tiles) {
  using Traits = WindowTraits<T, WindowPass::kKeys>;
  using Element = typename T::Element;
  constexpr int kColumns = Traits::kColumns, kOut = Traits::kOut;
  extern __shared__ __align__(16) char shared[];
  const int rows = layout.rows;
  Element* const sK = reinterpret_cast<Element*>(shared);  // (rows, kV), later dk
  Element* const sV = sK + rows * T::kLd;                  // (rows, kV), later dv
  const Columns<Traits> columns = columns_of<Traits>(shared);

  const bool in_ring = blockIdx.x >= token_blocks;
  const int64_t index = blockIdx.x - (in_ring ? token_blocks : 0);
  const int h = index % layout.heads;
  TokenTile tile;
  if (in_ring) {
    tile.n = index / layout.heads / ring_tiles;
    tile.first = static_cast<int>(index / layout.heads % ring_tiles - ring_tiles) * rows;
  } else {
    tile = token_tile(layout, index / layout.heads);
  }
  const WindowSequence seq = window_sequence(layout, tile.n);
  const int V = layout.head_dim, s0 = tile.first;
  if (s0 >= seq.length && !in_ring) return;
  const int s_end = min(s0 + rows, in_ring ? 0 : seq.length);
  const auto wanted = [&](int s) { return s < s_end && s >= -layout.ring_size; };

  __shared__ RowSource<Element> q, dout, dk, dv;
  __shared__ RowSource<float> lse_of, delta_of;
  if (threadIdx.x == 0) {
    q = row_source<Element>(p.q, seq, h);
    dout = row_source<Element>(p.dout, seq, h);
    dk = row_source<Element>(p.dk, p.dinitial_k_cache, seq, h, layout.ring_size);
    dv = row_source<Element>(p.dv, p.dinitial_v_cache, seq, h, layout.ring_size);
    lse_of = row_source<float>(p.lse, seq, h);
    delta_of = delta_source(deltas, layout, seq, h);
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

  const int l = threadIdx.x % 32, g = l / 4, c = l % 4 * 2;
  const int r0 = threadIdx.x / 32 * 16, s_warp = s0 + r0;
  const Band band = {0, layout.window - 1, 0, seq.length - 1};
  const int t0 = s0 + ((band.first(s0) - s0) & ~15);
  const int tiles = (band.last(s_end - 1) - t0 + kColumns) / kColumns;
  const auto load = [&](int i) {
    const int t = t0 + i * kColumns;
    load_tile<T>(columns.x(i), kColumns, q, t, band.lower, band.upper, V, layout.aligned);
    load_tile<T>(columns.y(i), kColumns, dout, t, band.lower, band.upper, V, layout.aligned);
    for (int j = threadIdx.x; j < kColumns; j += blockDim.x) {
      const bool valid = t + j <= band.upper;
      cp_async_4(columns.lse(i) + j, lse_of.row(valid ? t + j : 0), valid);
      cp_async_4(columns.delta(i) + j, delta_of.row(valid ? t + j : 0), valid);
    }
  };
  const auto load_keys = [&](Element* sX, const TensorView& view, const TensorView& ring) {
    load_tile<T>(sX, rows, row_source<Element>(view, ring, seq, h, layout.ring_size), s0,
                 -seq.past, band.upper, V, layout.aligned);
  };
  load_keys(sK, p.k, p.initial_k_cache);
  load_keys(sV, p.v, p.initial_v_cache);

  RowOperand<T, Traits::kRegisters> rK, rV;
  const float scale = static_cast<float>(p.scale);
  for (int out0 = 0; out0 < T::kV; out0 += kOut) {
    float rDk[kOut / 8][4] = {}, rDv[kOut / 8][4] = {};  // (16, kOut): dk / scale, dv
    columns.template for_each<true, true>(tiles, load, [&](int i, const float* flags) {
      if (i == 0 && out0 == 0) {
        rK.load(sK + r0 * T::kLd);
        rV.load(sV + r0 * T::kLd);
      }
#pragma unroll
      for (int b = 0; b < kColumns / 16; ++b) {
        const int t_block = t0 + i * kColumns + 16 * b;
        if (t_block > band.last(s_warp + 15) || t_block + 15 < band.first(s_warp)) continue;
        const Element* sQ = columns.x(i) + 16 * b * T::kLd;
        const Element* sDout = columns.y(i) + 16 * b * T::kLd;
        float weights[2][4] = {}, dscores[2][4] = {};  // of (key, query)
        mma_ABt<2>(weights, rK, sQ);
        mma_ABt<2>(dscores, rV, sDout);
        if (flags != nullptr) {
          add_flags(weights[0], flags + 16 * b + c);
          add_flags(weights[1], flags + 16 * b + 8 + c);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = 16 * b + 8 * j + c;
          const float2 lse = *reinterpret_cast<const float2*>(columns.lse(i) + at);
          const float2 delta = *reinterpret_cast<const float2*>(columns.delta(i) + at);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = weights[j][e];
            x = weight<Element>(x, scale * kLog2E, (e % 2 == 0 ? lse.x : lse.y) * kLog2E);
            dscores[j][e] = x * (dscores[j][e] - (e % 2 == 0 ? delta.x : delta.y));
          }
        }
        if (t_block < band.first(s_warp + 15) || t_block + 15 > band.last(s_warp)) {
          const int row = s_warp + g;
          const int low[2] = {band.first(row) - t_block, band.first(row + 8) - t_block};
          const int high[2] = {band.last(row) - t_block, band.last(row + 8) - t_block};
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            mask(weights[j], c + 8 * j, low, high, 0.0f);
            mask(dscores[j], c + 8 * j, low, high, 0.0f);
          }
        }
        mma_AB<T, kOut>(sDout + out0, Weights<Element>(weights[0], weights[1]), rDv);
        mma_AB<T, kOut>(sQ + out0, Weights<Element>(dscores[0], dscores[1]), rDk);
      }
    });

    __syncthreads();  // also where no tile passed by
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // slots that held no key
      const bool missing = s_warp + g + 8 * r < -seq.past;
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          rDk[j][i] = missing ? 0.0f : rDk[j][i] * scale;
          rDv[j][i] = missing ? 0.0f : rDv[j][i];
        }
      }
    }
    add_final_ring<Element, kOut>(rDk, p.dfinal_k_cache, seq, h, s_warp, out0, p.window, V);
    add_final_ring<Element, kOut>(rDv, p.dfinal_v_cache, seq, h, s_warp, out0, p.window, V);
    if constexpr (Traits::kRegisters) {
      stage_rows<T, kOut>(sK + r0 * T::kLd, rDk, 1.0f, 1.0f);
      stage_rows<T, kOut>(sV + r0 * T::kLd, rDv, 1.0f, 1.0f);
      __syncwarp();
      store_rows<T>(sK + r0 * T::kLd, dk, s_warp, V, layout.aligned, wanted);
      store_rows<T>(sV + r0 * T::kLd, dv, s_warp, V, layout.aligned, wanted);
    } else {
      store_accumulators<T, kOut>(rDk, dk, s_warp, out0, V, wanted);
      store_accumulators<T, kOut>(rDv, dv, s_warp, out0, V, wanted);
    }
  }
}

}  // namespace based::cuda
