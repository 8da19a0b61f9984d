// Causal linear attention, backward. With u_t = dout_t / den_t and delta_t = -<u_t, num_t> / den_t
// (u = dout, delta = 0 without the normaliser), dw_ts = <u_t, v_s> + delta_t is the gradient of
// every weight. A forward sweep recomputes S, z and gives dq; a reverse sweep carries
//   R = sum_t phi(q_t)^T u_t + dS_final,   r = sum_t phi(q_t) delta_t + dz_final
// and gives dk, dv; what is left of R, r at the start is the gradient of the initial state. No
// state is stored: scratch is one state and two numbers per token. Deterministic.
#include "linear_attention.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
struct Buffers {
  T *S, *z, *q, *qT, *k, *kT, *v, *u, *transposed, *out, *scores, *dscores, *phi, *dphi, *drows;
  T *dcolumns, *ones, *den, *delta;
  int64_t size;

  // `tokens` is the length of the longest sequence.
  Buffers(T* scratch, int64_t D, int64_t Dp, int64_t F, int64_t Vp, int64_t tokens) {
    Arena<T> arena{scratch};
    S = arena.take(F * Vp), z = arena.take(F);
    q = arena.take(kChunk * Dp), qT = arena.take(D * kChunk);
    k = arena.take(kChunk * Dp), kT = arena.take(D * kChunk);
    v = arena.take(kChunk * Vp), u = arena.take(kChunk * Vp), transposed = arena.take(Vp * kChunk);
    out = arena.take(kChunk * Vp), scores = arena.take(kChunk * kChunk);
    dscores = arena.take(kChunk * kChunk), phi = arena.take(F * kChunk);
    dphi = arena.take(F * kChunk), drows = arena.take(kChunk * Dp);
    dcolumns = arena.take(D * kChunk), ones = arena.take(kChunk);
    den = arena.take(tokens + kChunk), delta = arena.take(tokens + kChunk);
    size = arena.used;
  }
};

template <class T>
class Backward {
 public:
  Backward(const LinearAttentionBackwardParams& params, T* scratch, int64_t longest)
      : p(params),
        D(p.q.size[3]),
        V(p.v.size[3]),
        F(expanded_dim(D)),
        Dp(round_up_lanes<T>(D)),
        Vp(round_up_lanes<T>(V)),
        root(T(std::sqrt(p.scale))),
        s(scratch, D, Dp, F, Vp, longest) {
    for (int t = 0; scratch != nullptr && t < kChunk; ++t) s.ones[t] = 1;
  }

  int64_t scratch_size() const { return s.size; }

  void run(int64_t n_sequence, int64_t h) {
    head = h;
    seq = sequence(p.cu_seqlens, n_sequence, p.q.size[1]);
    load_state(s.S, Vp, s.z, p.initial_kv_state, p.initial_k_state, n_sequence, h, F, V);
    state_is_zero = p.initial_kv_state.rank < 0;
    for (int64_t t0 = seq.begin; t0 < seq.end; t0 += kChunk) forward_chunk(t0);

    load_state(s.S, Vp, s.z, p.dfinal_kv_state, p.dfinal_k_state, n_sequence, h, F, V);
    state_is_zero = p.dfinal_kv_state.rank < 0;
    const int64_t chunks = (seq.end - seq.begin + kChunk - 1) / kChunk;
    for (int64_t c = chunks - 1; c >= 0; --c) reverse_chunk(seq.begin + c * kChunk);
    store_state(p.dinitial_kv_state, p.dinitial_k_state, n_sequence, h, F, V, s.S, Vp, s.z);
  }

 private:
  // Loads a chunk: q, k (both layouts), v, and u = dout.
  void load_chunk(int64_t t0) {
    n = seq.end - t0 < kChunk ? seq.end - t0 : kChunk;
    den = s.den + (t0 - seq.begin), delta = s.delta + (t0 - seq.begin);
    load_rows(s.q, Dp, p.q, seq.batch, t0, n, head, root);
    load_rows(s.k, Dp, p.k, seq.batch, t0, n, head, root);
    load_rows(s.v, Vp, p.v, seq.batch, t0, n, head, T(1));
    load_rows(s.u, Vp, p.dout, seq.batch, t0, n, head, T(1));
    transpose(s.qT, s.q, Dp, n, D);
    transpose(s.kT, s.k, Dp, n, D);
    lower_product(s.scores, n, D, s.q, Dp, 1, s.kT);
  }

  void divide_by_den() {
    for (int64_t t = 0; t < n; ++t) {
      const T inverse = 1 / den[t];
      for (int64_t i = 0; i < Vp; ++i) s.u[t * Vp + i] *= inverse;
    }
  }

  // dscores = dw * (1 + score), scores <- w, on and below the diagonal. Needs u, v and delta.
  void score_gradients() {
    transpose(s.transposed, s.v, Vp, n, V);
    lower_product(s.dscores, n, V, s.u, Vp, 1, s.transposed);
    for (int64_t t = 0; t < n; ++t) {
      T *score = s.scores + t * kChunk, *dscore = s.dscores + t * kChunk;
      for (int64_t i = 0; i <= t; ++i) {
        dscore[i] = (dscore[i] + delta[t]) * (1 + score[i]);
        score[i] = 1 + score[i] + score[i] * score[i] / 2;
      }
    }
  }

  // dphi (F, kChunk) = state (F, V) times rows^T, plus z times weight; then through the Taylor map,
  // added to drows and stored: the gradient of the chunk's q or k.
  void finish_rows(const TensorView& gradient, int64_t t0, const T* rows, const T* weight,
                   const T* columns) {
    if (!state_is_zero) {
      transpose(s.transposed, rows, Vp, n, V);
      gemm(F, kChunk, {0, V}, s.S, Vp, 1, s.transposed, kChunk, s.dphi, kChunk, false);
      for (int64_t f = 0; f < F; ++f) {
        for (int64_t t = 0; t < n; ++t) s.dphi[f * kChunk + t] += s.z[f] * weight[t];
      }
      taylor_tile_backward<T, kChunk>(D, columns, s.dphi, s.dcolumns);
    }
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t j = 0; j < D; ++j) {
        T& value = s.drows[t * Dp + j];
        if (!state_is_zero) value += s.dcolumns[j * kChunk + t];
        value *= root;
      }
    }
    store_rows(gradient, seq.batch, t0, n, head, s.drows, Dp);
  }

  void forward_chunk(int64_t t0) {
    load_chunk(t0);
    if (p.normalize) {
      normalizer();
    } else {
      for (int64_t t = 0; t < n; ++t) delta[t] = 0;
    }
    score_gradients();
    gemm(n, Dp, {0, 1, 0, 1}, s.dscores, kChunk, 1, s.k, Dp, s.drows, Dp, false);
    finish_rows(p.dq, t0, s.u, delta, s.qT);
    taylor_tile<T, kChunk>(D, s.kT, s.phi);
    update_state(s.S, s.z, s.phi, s.v, s.ones, n, F, Vp);
    state_is_zero = false;
  }

  // den and delta of the chunk, and u divided by den. The numerator is recomputed in T: the rounded
  // out would break the cancellation sum_s dw_ts w_ts = 0.
  void normalizer() {
    if (state_is_zero) {
      for (int t = 0; t < kChunk; ++t) den[t] = 0;
    } else {
      taylor_tile<T, kChunk>(D, s.qT, s.phi);
      gemm(n, Vp, {0, F}, s.phi, 1, kChunk, s.S, Vp, s.out, Vp, false);
      read_k_state(den, s.phi, s.z, F);
    }
    for (int64_t t = 0; t < n; ++t) {
      const T* score = s.scores + t * kChunk;
      T* w = s.dscores + t * kChunk;  // free until score_gradients
      T sum = 0;
      for (int64_t i = 0; i <= t; ++i) {
        w[i] = 1 + score[i] + score[i] * score[i] / 2;
        sum += w[i];
      }
      den[t] += sum;
    }
    gemm(n, Vp, {0, 1, 0, 1}, s.dscores, kChunk, 1, s.v, Vp, s.out, Vp, !state_is_zero);
    divide_by_den();
    for (int64_t t = 0; t < n; ++t) {
      T dot = 0;
      for (int64_t i = 0; i < V; ++i) dot += s.u[t * Vp + i] * s.out[t * Vp + i];
      delta[t] = -dot / den[t];
    }
  }

  void reverse_chunk(int64_t t0) {
    load_chunk(t0);
    if (p.normalize) divide_by_den();
    score_gradients();
    // dv = W^T u + phi(k) R: row s takes the queries t >= s.
    if (!state_is_zero) {
      taylor_tile<T, kChunk>(D, s.kT, s.phi);
      gemm(n, Vp, {0, F}, s.phi, 1, kChunk, s.S, Vp, s.out, Vp, false);
    }
    gemm(n, Vp, {0, n, 1, 0}, s.scores, 1, kChunk, s.u, Vp, s.out, Vp, !state_is_zero);
    store_rows(p.dv, seq.batch, t0, n, head, s.out, Vp);
    gemm(n, Dp, {0, n, 1, 0}, s.dscores, 1, kChunk, s.q, Dp, s.drows, Dp, false);
    finish_rows(p.dk, t0, s.v, s.ones, s.kT);
    taylor_tile<T, kChunk>(D, s.qT, s.phi);
    update_state(s.S, s.z, s.phi, s.u, delta, n, F, Vp);
    state_is_zero = false;
  }

  const LinearAttentionBackwardParams& p;
  const int64_t D, V, F, Dp, Vp;
  const T root;
  const Buffers<T> s;
  Sequence seq{};
  int64_t head = 0, n = 0;
  T *den = nullptr, *delta = nullptr;  // of the current chunk
  bool state_is_zero = true;
};

template <class T>
bool backward(const LinearAttentionBackwardParams& p, ParallelFor parallel) {
  const int64_t sequences = sequence_count(p.cu_seqlens, p.q.size[0]), H = p.q.size[2];
  int64_t longest = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const Sequence seq = sequence(p.cu_seqlens, i, p.q.size[1]);
    if (seq.end - seq.begin > longest) longest = seq.end - seq.begin;
  }
  const int64_t scratch_size = Backward<T>(p, nullptr, longest).scratch_size();
  return for_each_task<T>(parallel, sequences * H, scratch_size, [&](int64_t task, T* scratch) {
    Backward<T>(p, scratch, longest).run(task / H, task % H);
  });
}

}  // namespace

bool linear_attention_backward(const LinearAttentionBackwardParams& p, ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? backward<double>(p, parallel)
                                      : backward<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
