// float32 linear attention, backward, in plain fp32 arithmetic. One CTA a (sequence, head); for 32
// columns of v after the other it walks the tokens forward (den, delta, dq), then backward (dk,
// dv). All is linear in the columns: delta, dq and dk are this tile's shares, added where they lie.
#pragma once

#include "linear_attention/simt.cuh"

namespace based::cuda::linear {

// sum over f of dphi_f dphi_f/dx_j, rows of phi as in taylor_row. dphi (F, 32) of token t.
__device__ inline float feature_gradient(const SimtChunk& c, const float* x, int t, int j,
                                         float root) {
  const int D = c.D;
  const auto dphi = [&](int f) { return c.phi[f * kSimtTile + t]; };
  float quadratic = 1.41421356237309505f * x[j] * dphi(1 + D + j);
  for (int r = 1; r <= D / 2; ++r) {
    const int row = 1 + 2 * D + (r - 1) * D;
    const int next = j + r < D ? j + r : j + r - D, previous = j >= r ? j - r : j - r + D;
    const bool half = 2 * r == D;
    if (!half || j < r) quadratic = fmaf(dphi(row + j), x[next], quadratic);
    if (!half || j >= r) quadratic = fmaf(dphi(row + previous), x[previous], quadratic);
  }
  return root * dphi(1 + j) + root * root * quadratic;
}

// phi (F, 32) = S y + z weight (weight null: 1): the gradient of the chunk's features.
__device__ inline void store_feature_gradients(const SimtChunk& c, const float* y,
                                               const float* weight) {
  for_each_thread(c.F * kSimtTile, [&](int i) {
    const int f = i / kSimtTile, t = i % kSimtTile;
    float sum = c.z[f] * (weight == nullptr ? 1.0f : weight[t]);
    for (int v = 0; v < kSimtTile; ++v) {
      sum = fmaf(c.S[f * kSimtTile + v], y[t * kSimtTile + v], sum);
    }
    c.phi[i] = sum;
  });
}

// dw_ts (1 + s_ts) scale, s <= t; entries above the diagonal are never read.
__device__ inline void store_score_gradients(const SimtChunk& c, float scale) {
  for_each_thread(kSimtTile * kSimtTile, [&](int i) {
    const int t = i / kSimtTile, s = i % kSimtTile;
    float dw = c.delta[t], score = 0;
    for (int v = 0; v < kSimtTile; ++v) {
      dw = fmaf(c.u[t * kSimtTile + v], c.v[s * kSimtTile + v], dw);
    }
    for (int j = 0; j < c.D; ++j) score = fmaf(c.q[t * c.D + j], c.k[s * c.D + j], score);
    c.dw[i] = dw * (1 + score * scale) * scale;
  });
}

static __global__ void __launch_bounds__(kSimtThreads)
    simt_backward_kernel(const __grid_constant__ SimtArguments arguments) {
  extern __shared__ float shared[];
  const Arguments& a = arguments.a;
  SimtChunk c(shared, arguments.D, arguments.F);
  const float root = sqrtf(a.scale);
  const int head = int(blockIdx.x % a.heads);
  const Segment seq = sequence_of(a, blockIdx.x / a.heads);
  const int64_t tokens = (seq.end - seq.begin + kSimtTile - 1) / kSimtTile * kSimtTile;

  for (int first = 0; first < a.head_dim; first += kSimtTile) {
    const int valid = min(kSimtTile, a.head_dim - first);
    const auto load = [&](int64_t t0) {
      c.n = int(min(int64_t(kSimtTile), seq.end - t0));
      load_rows(c.q, c.D, a.q, seq, t0, c.n, head, 0, c.D);
      load_rows(c.k, c.D, a.k, seq, t0, c.n, head, 0, c.D);
      load_rows(c.v, kSimtTile, a.v, seq, t0, c.n, head, first, valid);
      load_rows(c.u, kSimtTile, a.dout, seq, t0, c.n, head, first, valid);
    };
    const auto index = [&](int64_t t) { return (seq.batch * a.seqlen + t) * a.heads + head; };
    const auto divide_by_den = [&] {  // u, zero where there is no token
      for_each_thread(kSimtTile * kSimtTile, [&](int i) {
        if (i / kSimtTile < c.n) c.u[i] /= c.den[i / kSimtTile];
      });
    };
    // dx (32, D) of the chunk's q or k, this tile's share.
    const auto store = [&](const Rows& to, int64_t t0, const float* x, const auto& within) {
      for_each_thread(kSimtTile * c.D, [&](int i) {
        const int t = i / c.D, j = i % c.D;
        if (t >= c.n) return;
        float& at = to.at<float>(seq.batch, t0 + t, head)[j];
        const float share = feature_gradient(c, x + t * c.D, t, j, root) + within(t, j);
        at = first == 0 ? share : at + share;
      });
    };

    load_state(c, a.initial, seq.sequence, head, first, valid);
    for (int64_t t0 = seq.begin; t0 < seq.end; t0 += kSimtTile) {
      load(t0);
      __syncthreads();
      store_features(c, c.q, root);
      store_weights(c, a.scale);
      __syncthreads();
      if (a.normalize) {
        store_den(c);
      } else {
        for_each_thread(kSimtTile, [&](int t) { c.den[t] = 1; });
      }
      __syncthreads();
      divide_by_den();
      for_each_thread(kSimtTile * kSimtTile, [&](int i) {  // <u_t, out_t>, column by column
        c.dw[i] = a.normalize && i / kSimtTile < c.n
                      ? numerator(c, i / kSimtTile, i % kSimtTile) / c.den[i / kSimtTile]
                      : 0;
      });
      __syncthreads();
      for_each_thread(kSimtTile, [&](int t) {
        float dot = 0;
        for (int v = 0; v < valid; ++v) {
          dot = fmaf(c.u[t * kSimtTile + v], c.dw[t * kSimtTile + v], dot);
        }
        c.delta[t] = -dot;
        if (t < c.n) {
          arguments.den[index(t0 + t)] = c.den[t];
          arguments.delta[index(t0 + t)] = -dot;
        }
      });
      __syncthreads();
      store_score_gradients(c, a.scale);
      store_feature_gradients(c, c.u, c.delta);
      __syncthreads();
      store(a.dq, t0, c.q, [&](int t, int j) {
        float sum = 0;
        for (int s = 0; s <= t; ++s) sum = fmaf(c.dw[t * kSimtTile + s], c.k[s * c.D + j], sum);
        return sum;
      });
      __syncthreads();
      store_features(c, c.k, root);
      __syncthreads();
      update_state(c, c.v, nullptr);
      __syncthreads();
    }

    load_state(c, a.final, seq.sequence, head, first, valid);
    if (first > 0) for_each_thread(c.F, [&](int f) { c.z[f] = 0; });  // counted with the first tile
    for (int64_t t0 = seq.begin + tokens - kSimtTile; t0 >= seq.begin; t0 -= kSimtTile) {
      load(t0);
      for_each_thread(kSimtTile, [&](int t) {
        c.den[t] = t < c.n ? arguments.den[index(t0 + t)] : 1;
        c.delta[t] = t < c.n ? arguments.delta[index(t0 + t)] : 0;
      });
      __syncthreads();
      divide_by_den();
      store_weights(c, a.scale);
      store_features(c, c.k, root);
      __syncthreads();
      store_score_gradients(c, a.scale);
      for_each_thread(kSimtTile * kSimtTile, [&](int i) {
        const int s = i / kSimtTile, v = i % kSimtTile;
        if (s >= c.n || v >= valid) return;
        float sum = 0;
        for (int f = 0; f < c.F; ++f) {
          sum = fmaf(c.phi[f * kSimtTile + s], c.S[f * kSimtTile + v], sum);
        }
        for (int t = s; t < c.n; ++t) {
          sum = fmaf(c.w[t * kSimtTile + s], c.u[t * kSimtTile + v], sum);
        }
        a.dv.at<float>(seq.batch, t0 + s, head)[first + v] = sum;
      });
      __syncthreads();
      store_feature_gradients(c, c.v, nullptr);
      __syncthreads();
      store(a.dk, t0, c.k, [&](int s, int j) {
        float sum = 0;
        for (int t = s; t < c.n; ++t) sum = fmaf(c.dw[t * kSimtTile + s], c.q[t * c.D + j], sum);
        return sum;
      });
      __syncthreads();
      store_features(c, c.q, root);
      __syncthreads();
      update_state(c, c.u, c.delta);
      __syncthreads();
    }
    __syncthreads();
    store_state(c, a.dinitial, seq.sequence, head, first, valid, first > 0);
    __syncthreads();
  }
}

inline int64_t simt_backward_bytes(const LinearAttentionBackwardParams& p) {
  return 2 * p.q.size[0] * p.q.size[1] * p.q.size[2] * int64_t(sizeof(float));
}

inline Status simt_backward(const char* op, const LinearAttentionBackwardParams& p, void* workspace,
                            Stream stream) {
  SimtArguments s = simt_arguments(p);
  s.a.dout = rows_of(p.dout), s.a.dq = rows_of(p.dq), s.a.dk = rows_of(p.dk);
  s.a.dv = rows_of(p.dv);
  s.a.final = state_of(p.dfinal_kv_state, p.dfinal_k_state);
  s.a.dinitial = state_of(p.dinitial_kv_state, p.dinitial_k_state);
  s.den = static_cast<float*>(workspace);
  s.delta = s.den + p.q.size[0] * p.q.size[1] * p.q.size[2];
  return launch(op, simt_backward_kernel, s.a.sequences * s.a.heads, kSimtThreads,
                SimtChunk::bytes(s.D, s.F), stream, s);
}

}  // namespace based::cuda::linear
