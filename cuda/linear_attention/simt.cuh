// float32 linear attention in plain fp32 arithmetic (no tensor cores, no TF32). One CTA walks one
// (sequence, head), 32 tokens at a time, for 32 columns of v after the other; the state lies in
// shared memory in the public order. Formulas as in forward.cuh and gradients.cuh.
#pragma once

#include "linear_attention/launch.cuh"
#include "primitives/taylor.cuh"

namespace based::cuda::linear {

constexpr int kSimtTile = 32;  // tokens of a chunk, and columns of v
constexpr int kSimtThreads = 256;

struct SimtArguments {
  Arguments a;
  int D, F;
  float* den;  // (B, T, H): backward
  float* delta;
};

// A chunk in shared memory. Feature-major arrays are (F, 32 tokens), the others rows of tokens.
struct SimtChunk {
  float *S, *z, *phi, *q, *k, *v, *u, *w, *dw, *den, *delta;
  int D, F, n;

  __device__ SimtChunk(float* shared, int D, int F) : D(D), F(F), n(0) {
    constexpr int kSquare = kSimtTile * kSimtTile;
    S = shared, phi = S + F * kSimtTile, z = phi + F * kSimtTile;
    q = z + F, k = q + kSimtTile * D, v = k + kSimtTile * D, u = v + kSquare;
    w = u + kSquare, dw = w + kSquare, den = dw + kSquare, delta = den + kSimtTile;
  }
  static size_t bytes(int D, int F) {
    return sizeof(float) * (size_t(F) * (2 * kSimtTile + 1) + 2 * kSimtTile * D +
                            4 * kSimtTile * kSimtTile + 2 * kSimtTile);
  }
};

template <class Fn>
__device__ __forceinline__ void for_each_thread(int count, const Fn& fn) {
  for (int i = threadIdx.x; i < count; i += kSimtThreads) fn(i);
}

__device__ inline void load_rows(float* to, int width, const Rows& rows, const Segment& seq,
                                 int64_t t, int n, int head, int first, int valid) {
  for_each_thread(kSimtTile * width, [&](int i) {
    const int row = i / width, column = i % width;
    to[i] =
        row < n && column < valid ? rows.at<float>(seq.batch, t + row, head)[first + column] : 0;
  });
}

__device__ inline void store_features(const SimtChunk& c, const float* x, float root) {
  for_each_thread(c.F * kSimtTile, [&](int i) {
    const TaylorRow row = taylor_row(i / kSimtTile, c.D, root);
    const float* token = x + i % kSimtTile * c.D;
    c.phi[i] =
        row.coefficient * (row.i < 0 ? 1.0f : token[row.i]) * (row.j < 0 ? 1.0f : token[row.j]);
  });
}

// S += sum_t phi_t y_t, z += sum_t phi_t weight_t (weight null: 1) over the chunk's tokens.
__device__ inline void update_state(const SimtChunk& c, const float* y, const float* weight) {
  for_each_thread(c.F * kSimtTile, [&](int i) {
    const float* phi = c.phi + i / kSimtTile * kSimtTile;
    float sum = 0;
    for (int t = 0; t < c.n; ++t) sum = fmaf(phi[t], y[t * kSimtTile + i % kSimtTile], sum);
    c.S[i] += sum;
  });
  for_each_thread(c.F, [&](int f) {
    float sum = 0;
    for (int t = 0; t < c.n; ++t) {
      sum = fmaf(c.phi[f * kSimtTile + t], weight == nullptr ? 1.0f : weight[t], sum);
    }
    c.z[f] += sum;
  });
}

__device__ inline void load_state(const SimtChunk& c, const State& state, int64_t n, int head,
                                  int first, int valid) {
  const bool given = state.kv != nullptr;
  for_each_thread(c.F * kSimtTile, [&](int i) {
    const int f = i / kSimtTile, v = i % kSimtTile;
    c.S[i] =
        given && v < valid
            ? state.kv[n * state.kv_sequence + head * state.kv_head + f * state.kv_row + first + v]
            : 0;
  });
  for_each_thread(c.F, [&](int f) {
    c.z[f] = given ? state.k[n * state.k_sequence + head * state.k_head + f] : 0;
  });
}

// add_k: k_state joins what earlier tiles of V left there.
__device__ inline void store_state(const SimtChunk& c, const State& state, int64_t n, int head,
                                   int first, int valid, bool add_k) {
  if (state.kv == nullptr) return;
  for_each_thread(c.F * kSimtTile, [&](int i) {
    const int f = i / kSimtTile, v = i % kSimtTile;
    if (v < valid) {
      state.kv[n * state.kv_sequence + head * state.kv_head + f * state.kv_row + first + v] =
          c.S[i];
    }
  });
  for_each_thread(c.F, [&](int f) {
    float& at = state.k[n * state.k_sequence + head * state.k_head + f];
    at = add_k ? at + c.z[f] : c.z[f];
  });
}

// w_ts of the chunk; entries above the diagonal are never read.
__device__ inline void store_weights(const SimtChunk& c, float scale) {
  for_each_thread(kSimtTile * kSimtTile, [&](int i) {
    const float *q = c.q + i / kSimtTile * c.D, *k = c.k + i % kSimtTile * c.D;
    float s = 0;
    for (int j = 0; j < c.D; ++j) s = fmaf(q[j], k[j], s);
    s *= scale;
    c.w[i] = fmaf(s, fmaf(s, 0.5f, 1.0f), 1.0f);
  });
}

// den_t = phi(q_t) z + sum_{s<=t} w_ts; phi holds the features of q.
__device__ inline void store_den(const SimtChunk& c) {
  for_each_thread(kSimtTile, [&](int t) {
    float before = 0, inside = 0;
    for (int f = 0; f < c.F; ++f) before = fmaf(c.phi[f * kSimtTile + t], c.z[f], before);
    for (int s = 0; s <= t; ++s) inside += c.w[t * kSimtTile + s];
    c.den[t] = before + inside;
  });
}

__device__ inline float numerator(const SimtChunk& c, int t, int v) {
  float before = 0, inside = 0;
  for (int f = 0; f < c.F; ++f) {
    before = fmaf(c.phi[f * kSimtTile + t], c.S[f * kSimtTile + v], before);
  }
  for (int s = 0; s <= t; ++s) {
    inside = fmaf(c.w[t * kSimtTile + s], c.v[s * kSimtTile + v], inside);
  }
  return before + inside;
}

static __global__ void __launch_bounds__(kSimtThreads)
    simt_forward_kernel(const __grid_constant__ SimtArguments arguments) {
  extern __shared__ float shared[];
  const Arguments& a = arguments.a;
  SimtChunk c(shared, arguments.D, arguments.F);
  const float root = sqrtf(a.scale);
  const int64_t row = blockIdx.x / a.tiles;
  const int first = int(blockIdx.x % a.tiles) * kSimtTile, head = int(row % a.heads);
  const int valid = min(kSimtTile, a.head_dim - first);
  const Segment seq = sequence_of(a, row / a.heads);
  load_state(c, a.initial, seq.sequence, head, first, valid);
  for (int64_t t0 = seq.begin; t0 < seq.end; t0 += kSimtTile) {
    c.n = int(min(int64_t(kSimtTile), seq.end - t0));
    load_rows(c.q, c.D, a.q, seq, t0, c.n, head, 0, c.D);
    load_rows(c.k, c.D, a.k, seq, t0, c.n, head, 0, c.D);
    load_rows(c.v, kSimtTile, a.v, seq, t0, c.n, head, first, valid);
    __syncthreads();
    store_features(c, c.q, root);
    store_weights(c, a.scale);
    __syncthreads();
    store_den(c);
    __syncthreads();
    for_each_thread(kSimtTile * kSimtTile, [&](int i) {
      const int t = i / kSimtTile, v = i % kSimtTile;
      if (t >= c.n || v >= valid) return;
      const float sum = numerator(c, t, v);
      a.out.at<float>(seq.batch, t0 + t, head)[first + v] = a.normalize ? sum / c.den[t] : sum;
    });
    __syncthreads();
    store_features(c, c.k, root);
    __syncthreads();
    update_state(c, c.v, nullptr);
    __syncthreads();
  }
  __syncthreads();
  store_state(c, a.final, seq.sequence, head, first, valid, false);  // every tile has the same z
}

// The tokens of a sequence are walked in one piece; D and F are run-time values here.
inline SimtArguments simt_arguments(const LinearAttentionParams& p) {
  SimtArguments s{};
  set_segments(s.a, p, 1, 0.0, 1);
  s.a.tiles = (s.a.head_dim + kSimtTile - 1) / kSimtTile;
  s.a.q = rows_of(p.q), s.a.k = rows_of(p.k), s.a.v = rows_of(p.v);
  s.a.initial = state_of(p.initial_kv_state, p.initial_k_state);
  s.D = int(p.q.size[3]), s.F = int(expanded_dim(p.q.size[3]));
  return s;
}

inline Status simt_forward(const char* op, const LinearAttentionParams& p, Stream stream) {
  SimtArguments s = simt_arguments(p);
  s.a.out = rows_of(p.out);
  s.a.final = state_of(p.final_kv_state, p.final_k_state);
  return launch(op, simt_forward_kernel, s.a.sequences * s.a.heads * s.a.tiles, kSimtThreads,
                SimtChunk::bytes(s.D, s.F), stream, s);
}

}  // namespace based::cuda::linear
