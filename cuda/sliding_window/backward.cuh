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
  constexpr int kStep = Traits::kStep, kOut = Traits::kOut;
  extern __shared__ __align__(16) char shared[];
  const Columns<Traits> columns = columns_of<Traits>(shared, layout);

  const int h = blockIdx.x % layout.heads;
  const TokenTile tile = token_tile(layout, blockIdx.x / layout.heads);
  const WindowSequence seq = window_sequence(layout, tile.n);
  const int V = layout.head_dim, t0 = tile.first;
  if (t0 >= seq.length) return;
  const int t_end = min(t0 + layout.rows, seq.length);

  __shared__ RowSource<Element> q, k, v, out, dout, dq;
  __shared__ RowSource<float> lse_of, delta_of;
  const int computing_warps = blockDim.x / 32 - 1, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    q = row_source<Element>(p.q, seq, h);
    k = row_source<Element>(p.k, p.initial_k_cache, seq, h, layout.ring_size);
    v = row_source<Element>(p.v, p.initial_v_cache, seq, h, layout.ring_size);
    out = row_source<Element>(p.out, seq, h);
    dout = row_source<Element>(p.dout, seq, h);
    dq = row_source<Element>(p.dq, seq, h);
    lse_of = row_source<float>(p.lse, seq, h);
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
  const int last_strip = t0 + (t_end - 1 - t0) / kBlock * kBlock;
  const int count = ((band.last(last_strip + 15) - s0) >> 4) + kStep;
  if (warp == computing_warps) {
    const RowSource<Element> rK = k, rV = v;
    bool again = false;
    for (int before = 0, out0 = 0; out0 < T::kV; before += count) {
      columns.template produce<true, false>(
          before, count, layout.aligned, again, [&](int i, int stage) {
            const int s = s0 + i * kBlock;
            load_block<T>(columns.x(stage), rK, s, band.lower, band.upper, V, layout.aligned);
            load_block<T>(columns.y(stage), rV, s, band.lower, band.upper, V, layout.aligned);
          });
      again = !again && any_in_block(false);
      if (!again) out0 += kOut;
    }
    return;
  }

  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4 * 2;
  Element* const sQ = reinterpret_cast<Element*>(shared + warp * Traits::kWarpBytes);
  Element* const sDout = sQ + kBlock * T::kLd;
  const auto fetch = [&](int t_strip) {
    if (t_strip < t_end) {
      load_block<T>(sQ, q, t_strip, 0, band.upper, V, layout.aligned);
      load_block<T>(sDout, dout, t_strip, 0, band.upper, V, layout.aligned);
    }
    cp_async_commit();
  };
  const float scale = static_cast<float>(p.scale);
  bool again = false;
  for (int before = 0, out0 = 0; out0 < T::kV; before += count) {  // once, unless head_dim is large
    bool finite = true;
    int released = before;
    fetch(t0 + warp * kBlock);
    for (int t_strip = t0 + warp * kBlock; t_strip < t_end; t_strip += computing_warps * kBlock) {
      const int t_next = t_strip + computing_warps * kBlock;
      const RowBand rows(band, t_strip, g);
      const Walk walk(band, t_strip, s0, kStep);
      const int keep = t_next < t_end ? Walk(band, t_next, s0, kStep).first : count;
      columns.skip(released, before + walk.first);
      RowOperand<T, Traits::kRegisters> rQ, rDout;
      cp_async_wait<0>();
      __syncwarp();
      rQ.load(sQ);
      rDout.load(sDout);
      float lse[2] = {}, delta[2] = {};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int t = t_strip + g + 8 * r;
        if (t < t_end) {
          lse[r] = *lse_of.row(t) * kLog2E;
          delta[r] = quarter_dot<T>(out.row(t), sDout + (g + 8 * r) * T::kLd, V, layout.aligned);
        }
        delta[r] = quad_sum(delta[r]);
      }
      if constexpr (Traits::kRegisters) {
        __syncwarp();
        fetch(t_next);
      }

      float rDq[kOut / 8][4] = {}, rMean[kOut / 8][4] = {};  // (16, kOut): dq / scale, sum p_ts k_s
      float error[2] = {};
#pragma unroll 1
      for (int step = 0; step < walk.steps; ++step) {
        const int block = walk.first + step * kStep, first = s0 + block * kBlock;
        int stage[kStep];
        const Element *sK[kStep], *sV[kStep];
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
          stage[b] = columns.wait(before + block + b);
          sK[b] = columns.x(stage[b]), sV[b] = columns.y(stage[b]);
        }
        float weights[kStep][2][4], dscores[kStep][2][4];
        mma_ABt<kStep>(weights, rQ, sK);
        mma_ABt<kStep>(dscores, rDout, sV);
#pragma unroll
        for (int b = 0; b < kStep; ++b) {
          const int column = first + b * kBlock;
          if (again) add_flags(weights[b], columns.flags(stage[b]));
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float& x = weights[b][j / 4][j % 4];
            float& ds = dscores[b][j / 4][j % 4];
            x = weight<Element>(x, scale * kLog2E, lse[j % 4 / 2]);
            ds = x * (ds - delta[j % 4 / 2]);
          }
          if (rows.cuts(column)) {
            rows.mask(weights[b], column + c, 0.0f);
            rows.mask(dscores[b], column + c, 0.0f);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) error[j % 4 / 2] += dscores[b][j / 4][j % 4];
          mma_AB<T, kOut>(sK[b] + out0, Weights<Element>(dscores[b][0], dscores[b][1]), rDq,
                          Weights<Element>(weights[b][0], weights[b][1]), rMean);
        }
        columns.release(released, before + min(block + kStep, keep));
      }

      finite &= all_finite(rDq) && all_finite(rMean);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        error[r] = quad_sum(error[r]);
        const int t = t_strip + g + 8 * r;
        if (c == 0 && t < t_end) *delta_of.row(t) = delta[r] + error[r];
      }
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rDq[j][i] -= error[i / 2] * rMean[j][i];
      }
      const float factors[2] = {scale, scale};
      store_strip<T, kOut>(rDq, factors, dq, t_strip, out0, V, layout.aligned,
                           [&](int t) { return t < t_end; });
      if constexpr (!Traits::kRegisters) {
        __syncwarp();
        fetch(t_next);
      }
    }
    columns.skip(released, before + count);
    again = !again && any_in_block(!finite);
    if (!again) out0 += kOut;
  }
}

}  // namespace based::cuda
