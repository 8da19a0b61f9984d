// Sliding-window attention, backward. With p_ts = e^(scale <q_t, k_s> - lse_t), delta_t = <dout_t,
// out_t> and ds_ts = p_ts (<dout_t, v_s> - delta_t):
//   dq_t = scale sum_s ds_ts k_s,   dk_s = scale sum_t ds_ts q_t,   dv_s = sum_t p_ts dout_t
// The rounding of out puts an error e_t into delta_t, which takes e_t sum_s p_ts k_s from dq_t and
// e_t p_ts q_t from dk_s: much when v has a mean. The exact sum_s ds_ts is 0, so what it comes to
// is e_t: dq_t is corrected, and delta_t + e_t is kept for the keys.
//
// Two kernels recompute p, first over tiles of queries for dq and delta, then over tiles of keys
// for dk and dv; keys of the initial ring have tiles of their own. Every gradient is written once,
// so the result does not depend on how CTAs are scheduled. Products as in the forward, with p and
// ds rounded to Element; the sum of ds is that of the unrounded ones.
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

// A lane's share of <x, y>, x in global and y in shared memory: every fourth chunk.
template <class T>
__device__ __forceinline__ float quarter_dot(const typename T::Element* x,
                                             const typename T::Element* y, int head_dim,
                                             bool aligned) {
  float sum = 0.0f;
  for (int c = threadIdx.x % 4 * T::kChunk; c < head_dim; c += 4 * T::kChunk) {
    if (aligned) {
      alignas(16) typename T::Element chunk[T::kChunk];
      *reinterpret_cast<uint4*>(chunk) = *reinterpret_cast<const uint4*>(x + c);
#pragma unroll
      for (int e = 0; e < T::kChunk; ++e) sum = fmaf(to_float(chunk[e]), to_float(y[c + e]), sum);
    } else {
      for (int e = c; e < min(head_dim, c + T::kChunk); ++e) {
        sum = fmaf(to_float(x[e]), to_float(y[e]), sum);
      }
    }
  }
  return sum;
}

__device__ __forceinline__ RowSource<float> delta_source(float* deltas, const WindowLayout& layout,
                                                         const WindowSequence& seq, int h) {
  return {deltas + (seq.batch * layout.seqlen + seq.begin) * layout.heads + h,
          layout.heads,
          nullptr,
          0,
          0,
          0};
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
  const Columns<Traits> columns = columns_of<Traits>(shared);

  const int h = blockIdx.x % layout.heads;
  const TokenTile tile = token_tile(layout, blockIdx.x / layout.heads);
  const WindowSequence seq = window_sequence(layout, tile.n);
  const int V = layout.head_dim, t0 = tile.first;
  if (t0 >= seq.length) return;
  const int t_end = min(t0 + layout.rows, seq.length);

  __shared__ RowSource<Element> q, k, v, dq;
  __shared__ RowSource<float> delta_of;
  const int computing_warps = blockDim.x / 32 - 1, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    q = row_source<Element>(p.q, seq, h);
    k = row_source<Element>(p.k, p.initial_k_cache, seq, h, layout.ring_size);
    v = row_source<Element>(p.v, p.initial_v_cache, seq, h, layout.ring_size);
    dq = row_source<Element>(p.dq, seq, h);
    delta_of = delta_source(deltas, layout, seq, h);
    columns.init(computing_warps);
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
  if (warp == computing_warps) {
    bool again = false;
    for (int before = 0, out0 = 0; out0 < T::kV;) {
      columns.template produce<true, false>(
          before, tiles, layout.aligned, again, [&](int i, int stage) {
            const int s = s0 + i * kColumns;
            load_rows<T>(columns.x(stage), kColumns, k, s, band.lower, band.upper, V,
                         layout.aligned);
            load_rows<T>(columns.y(stage), kColumns, v, s, band.lower, band.upper, V,
                         layout.aligned);
          });
      before += tiles;
      again = !again && __syncthreads_or(false);
      if (!again) out0 += kOut;
    }
    return;
  }

  const int l = threadIdx.x % 32, g = l / 4, c = l % 4 * 2;
  const int t_warp = t0 + warp * 16;
  Element* const sQ = reinterpret_cast<Element*>(shared + warp * Traits::kWarpBytes);  // later dq
  Element* const sDout = sQ + computing_warps * 16 * T::kLd;
  load_rows<T>(sQ, 16, q, t_warp, 0, band.upper, V, layout.aligned);
  load_rows<T>(sDout, 16, row_source<Element>(p.dout, seq, h), t_warp, 0, band.upper, V,
               layout.aligned);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  RowOperand<T, Traits::kRegisters> rQ, rDout;
  rQ.load(sQ);
  rDout.load(sDout);

  float lse[2] = {}, delta[2] = {};
  {
    const auto out = row_source<Element>(p.out, seq, h);
    const auto lse_of = row_source<float>(p.lse, seq, h);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = t_warp + g + 8 * r;
      if (t < t_end) {
        lse[r] = *lse_of.row(t) * kLog2E;
        delta[r] = quarter_dot<T>(out.row(t), sDout + (g + 8 * r) * T::kLd, V, layout.aligned);
      }
      delta[r] = quad_sum(delta[r]);
    }
  }

  const float scale = static_cast<float>(p.scale);
  const RowBand rows(band, t_warp, g);
  const auto wanted = [&](int t) { return t < t_end; };
  bool again = false;
  for (int before = 0, out0 = 0; out0 < T::kV;) {          // once, unless head_dim is large
    float rDq[kOut / 8][4] = {}, rMean[kOut / 8][4] = {};  // (16, kOut): dq / scale, sum_s p_ts k_s
    float error[2] = {};
    columns.consume(before, tiles, again, [&](int i, int stage, const float* flags) {
      const int first = s0 + i * kColumns;
      if (first > rows.last || first + kColumns <= rows.first) return;
#pragma unroll
      for (int b = 0; b < kColumns / 16; ++b) {
        const int s_block = first + 16 * b;
        if (!rows.meets(s_block)) continue;
        const Element* sK = columns.x(stage) + 16 * b * T::kLd;
        float weights[2][4] = {}, dscores[2][4] = {};
        mma_ABt<2>(weights, rQ, sK);
        mma_ABt<2>(dscores, rDout, columns.y(stage) + 16 * b * T::kLd);
        if (flags != nullptr) add_flags(weights, flags + 16 * b + c);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          float& x = weights[j / 4][j % 4];
          x = weight<Element>(x, scale * kLog2E, lse[j % 4 / 2]);
          dscores[j / 4][j % 4] = x * (dscores[j / 4][j % 4] - delta[j % 4 / 2]);
        }
        if (rows.cuts(s_block)) {
          rows.mask(weights, s_block + c, 0.0f);
          rows.mask(dscores, s_block + c, 0.0f);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) error[j % 4 / 2] += dscores[j / 4][j % 4];
        mma_AB<T, kOut>(sK + out0, Weights<Element>(dscores[0], dscores[1]), rDq,
                        Weights<Element>(weights[0], weights[1]), rMean);
      }
    });
    before += tiles;
    again = !again && __syncthreads_or(t_warp < t_end && !(all_finite(rDq) && all_finite(rMean)));
    if (again) continue;

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
    if constexpr (Traits::kRegisters) {
      stage_rows<T, kOut>(sQ, rDq, 1.0f, 1.0f);
      __syncwarp();
      store_rows<T>(sQ, dq, t_warp, V, layout.aligned, wanted);
    } else {
      store_accumulators<T, kOut>(rDq, dq, t_warp, out0, V, wanted);
    }
    out0 += kOut;
  }
}

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
  constexpr int kColumns = Traits::kColumns, kOut = Traits::kOut;
  extern __shared__ __align__(16) char shared[];
  const Columns<Traits> columns = columns_of<Traits>(shared);

  const bool in_ring = blockIdx.x >= token_blocks;
  const int64_t index = blockIdx.x - (in_ring ? token_blocks : 0);
  const int h = index % layout.heads;
  TokenTile tile;
  if (in_ring) {
    tile.n = index / layout.heads / ring_tiles;
    tile.first = static_cast<int>(index / layout.heads % ring_tiles - ring_tiles) * layout.rows;
  } else {
    tile = token_tile(layout, index / layout.heads);
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
  const int tiles = max(0, (band.last(s_end - 1) - t0 + kColumns) / kColumns);
  if (warp == computing_warps) {
    bool again = false;
    for (int before = 0, out0 = 0; out0 < T::kV;) {
      columns.template produce<true, true>(
          before, tiles, layout.aligned, again, [&](int i, int stage) {
            const int t = t0 + i * kColumns;
            load_rows<T>(columns.x(stage), kColumns, q, t, 0, band.upper, V, layout.aligned);
            load_rows<T>(columns.y(stage), kColumns, dout, t, 0, band.upper, V, layout.aligned);
            for (int j = threadIdx.x % 32; j < kColumns; j += 32) {
              const bool valid = t + j <= band.upper;
              cp_async_4(columns.lse(stage) + j, lse_of.row(valid ? t + j : 0), valid);
              cp_async_4(columns.delta(stage) + j, delta_of.row(valid ? t + j : 0), valid);
            }
          });
      before += tiles;
      again = !again && __syncthreads_or(false);
      if (!again) out0 += kOut;
    }
    return;
  }

  const int l = threadIdx.x % 32, g = l / 4, c = l % 4 * 2;
  const int s_warp = s0 + warp * 16;
  Element* const sK = reinterpret_cast<Element*>(shared + warp * Traits::kWarpBytes);  // later dk
  Element* const sV = sK + computing_warps * 16 * T::kLd;                              // later dv
  load_rows<T>(sK, 16, k, s_warp, -seq.past, band.upper, V, layout.aligned);
  load_rows<T>(sV, 16, v, s_warp, -seq.past, band.upper, V, layout.aligned);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  RowOperand<T, Traits::kRegisters> rK, rV;
  rK.load(sK);
  rV.load(sV);

  const float scale = static_cast<float>(p.scale);
  const RowBand rows(band, s_warp, g);
  bool again = false;
  for (int before = 0, out0 = 0; out0 < T::kV;) {
    float rDk[kOut / 8][4] = {}, rDv[kOut / 8][4] = {};  // (16, kOut): dk / scale, dv
    if (p.dfinal_k_cache.rank >= 0 && s_warp + 15 >= seq.length - p.window) {
      start_from_final_ring<Element, kOut>(rDk, 1.0f / scale, p.dfinal_k_cache, seq, h, s_warp,
                                           out0, p.window, V);
      start_from_final_ring<Element, kOut>(rDv, 1.0f, p.dfinal_v_cache, seq, h, s_warp, out0,
                                           p.window, V);
    }
    columns.consume(before, tiles, again, [&](int i, int stage, const float* flags) {
      const int first = t0 + i * kColumns;
      if (first > rows.last || first + kColumns <= rows.first) return;
#pragma unroll
      for (int b = 0; b < kColumns / 16; ++b) {
        const int t_block = first + 16 * b;
        if (!rows.meets(t_block)) continue;
        const Element* sQ = columns.x(stage) + 16 * b * T::kLd;
        const Element* sDout = columns.y(stage) + 16 * b * T::kLd;
        float weights[2][4] = {}, dscores[2][4] = {};  // of (key, query)
        mma_ABt<2>(weights, rK, sQ);
        mma_ABt<2>(dscores, rV, sDout);
        if (flags != nullptr) add_flags(weights, flags + 16 * b + c);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = 16 * b + 8 * j + c;
          const float2 lse = *reinterpret_cast<const float2*>(columns.lse(stage) + at);
          const float2 delta = *reinterpret_cast<const float2*>(columns.delta(stage) + at);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& x = weights[j][e];
            x = weight<Element>(x, scale * kLog2E, (e % 2 == 0 ? lse.x : lse.y) * kLog2E);
            dscores[j][e] = x * (dscores[j][e] - (e % 2 == 0 ? delta.x : delta.y));
          }
        }
        if (rows.cuts(t_block)) {
          rows.mask(weights, t_block + c, 0.0f);
          rows.mask(dscores, t_block + c, 0.0f);
        }
        mma_AB<T, kOut>(sDout + out0, Weights<Element>(weights[0], weights[1]), rDv);
        mma_AB<T, kOut>(sQ + out0, Weights<Element>(dscores[0], dscores[1]), rDk);
      }
    });
    before += tiles;
    again = !again && __syncthreads_or(s_warp < s_end && !(all_finite(rDk) && all_finite(rDv)));
    if (again) continue;

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
    if constexpr (Traits::kRegisters) {
      stage_rows<T, kOut>(sK, rDk, 1.0f, 1.0f);
      stage_rows<T, kOut>(sV, rDv, 1.0f, 1.0f);
      __syncwarp();
      store_rows<T>(sK, dk, s_warp, V, layout.aligned, wanted);
      store_rows<T>(sV, dv, s_warp, V, layout.aligned, wanted);
    } else {
      store_accumulators<T, kOut>(rDk, dk, s_warp, out0, V, wanted);
      store_accumulators<T, kOut>(rDv, dv, s_warp, out0, V, wanted);
    }
    out0 += kOut;
  }
}

}  // namespace based::cuda
