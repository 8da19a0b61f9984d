// Causal linear attention, forward. One task walks one (sequence, head), chunk by chunk:
//   out_t = (phi(q_t) S + sum_{s<=t in chunk} w_ts v_s) / (phi(q_t) z + sum_{s<=t in chunk} w_ts)
// then S += phi(k)^T v, z += sum phi(k). Everything is T: float, or double for float64.
#include "linear_attention.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
struct Buffers {
  T *S, *z, *q, *qT, *k, *kT, *v, *out, *scores, *phi, *den, *ones;
  int64_t size;

  Buffers(T* scratch, int64_t D, int64_t F, int64_t Vp) {
    Arena<T> arena{scratch};
    S = arena.take(F * Vp), z = arena.take(F);
    q = arena.take(kChunk * D), qT = arena.take(D * kChunk);
    k = arena.take(kChunk * D), kT = arena.take(D * kChunk);
    v = arena.take(kChunk * Vp), out = arena.take(kChunk * Vp);
    scores = arena.take(kChunk * kChunk), phi = arena.take(F * kChunk);
    den = arena.take(kChunk), ones = arena.take(kChunk);
    size = arena.used;
  }
};

template <class T>
bool forward(const LinearAttentionParams& p, ParallelFor parallel) {
  const int64_t B = p.q.size[0], seqlen = p.q.size[1], H = p.q.size[2];
  const int64_t D = p.q.size[3], V = p.v.size[3], F = expanded_dim(D), Vp = round_up_lanes<T>(V);
  const T root = T(std::sqrt(p.scale));
  const int64_t tasks = sequence_count(p.cu_seqlens, B) * H;
  return for_each_task<T>(
      parallel, tasks, Buffers<T>(nullptr, D, F, Vp).size, [&](int64_t task, T* scratch) {
        const Buffers<T> s(scratch, D, F, Vp);
        const int64_t n_sequence = task / H, h = task % H;
        const Sequence seq = sequence(p.cu_seqlens, n_sequence, seqlen);
        load_state(s.S, Vp, s.z, p.initial_kv_state, p.initial_k_state, n_sequence, h, F, V);
        bool state_is_zero = p.initial_kv_state.rank < 0;
        for (int t = 0; t < kChunk; ++t) s.ones[t] = 1;

        for (int64_t t0 = seq.begin; t0 < seq.end; t0 += kChunk) {
          const int64_t n = seq.end - t0 < kChunk ? seq.end - t0 : kChunk;
          load_rows(s.q, D, p.q, seq.batch, t0, n, h, root);
          load_rows(s.k, D, p.k, seq.batch, t0, n, h, root);
          load_rows(s.v, Vp, p.v, seq.batch, t0, n, h, T(1));
          transpose(s.qT, s.q, D, n, D);
          transpose(s.kT, s.k, D, n, D);

          if (state_is_zero) {
            for (int t = 0; t < kChunk; ++t) s.den[t] = 0;
          } else {
            taylor_tile<T, kChunk>(D, s.qT, s.phi);
            gemm(n, Vp, {0, F}, s.phi, 1, kChunk, s.S, Vp, s.out, Vp, false);
            read_k_state(s.den, s.phi, s.z, F);
          }
          lower_product(s.scores, n, D, s.q, D, 1, s.kT);
          for (int64_t t = 0; t < n; ++t) {
            T* w = s.scores + t * kChunk;
            T sum = 0;
            for (int64_t i = 0; i <= t; ++i) {
              w[i] = 1 + w[i] + w[i] * w[i] / 2;
              sum += w[i];
            }
            s.den[t] += sum;
          }
          gemm(n, Vp, {0, 1, 0, 1}, s.scores, kChunk, 1, s.v, Vp, s.out, Vp, !state_is_zero);
          if (p.normalize) {
            for (int64_t t = 0; t < n; ++t) {
              const T inverse = 1 / s.den[t];
              for (int64_t i = 0; i < Vp; ++i) s.out[t * Vp + i] *= inverse;
            }
          }
          store_rows(p.out, seq.batch, t0, n, h, s.out, Vp);

          taylor_tile<T, kChunk>(D, s.kT, s.phi);
          update_state(s.S, s.z, s.phi, s.v, s.ones, n, F, Vp);
          state_is_zero = false;
        }
        store_state(p.final_kv_state, p.final_k_state, n_sequence, h, F, V, s.S, Vp, s.z);
      });
}

}  // namespace

bool linear_attention(const LinearAttentionParams& p, ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? forward<double>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
