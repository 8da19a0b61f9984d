// Sliding-window attention, backward. With p_ts = e^(score_ts - lse_t), delta_t = <dout_t, out_t>
// and ds_ts = p_ts (<dout_t, v_s> - delta_t):
//   dq_t = scale sum_s ds_ts k_s,   dk_s = scale sum_t ds_ts q_t,   dv_s = sum_t p_ts dout_t
// The rounding of out puts an error e_t into delta_t, which takes e_t sum_s p_ts k_s from dq_t and
// e_t p_ts q_t from dk_s: much when v has a mean. The exact sum_s ds_ts is 0, so what it comes to
// is e_t: dq_t is corrected, and delta_t + e_t is kept for the keys.
//
// One task is one (tile of kChunk tokens, head); scores are recomputed twice, first with its tokens
// as queries for dq, then as keys for dk and dv. Keys of the initial ring have tasks of their own.
// Every gradient is written by one task, so the result does not depend on how tasks are spread.
#include <stdlib.h>

#include "exp.h"
#include "sliding_window.h"

namespace based::cpu::BASED_ISA {
namespace {

// The columns of a tile, transposed, and the block of rows that meets them.
template <class T>
struct Buffers {
  T *column_qk, *column_v, *row_qk, *row_v, *weights, *dscores, *dqk, *dv, *lse, *delta, *row;
  T *error, *mean_key, *part;
  int64_t size;

  Buffers(T* scratch, int64_t V, int64_t Vp) {
    Arena<T> arena{scratch};
    column_qk = arena.take(V * kChunk), column_v = arena.take(V * kChunk);
    row_qk = arena.take(kRowBlock * Vp), row_v = arena.take(kRowBlock * Vp);
    weights = arena.take(kRowBlock * kChunk), dscores = arena.take(kRowBlock * kChunk);
    dqk = arena.take(kChunk * Vp), dv = arena.take(kChunk * Vp);
    lse = arena.take(kRowBlock), delta = arena.take(kRowBlock), row = arena.take(Vp);
    error = arena.take(kChunk), mean_key = arena.take(kChunk * Vp);
    part = arena.take(kChunk * Vp);
    size = arena.used;
  }
};

template <class T>
class Backward {
 public:
  // deltas (B, T, H) is written by query_tile and read by the others.
  Backward(const SlidingWindowBackwardParams& params, const WindowSequence& sequence, int64_t head,
           T* deltas, T* scratch)
      : p(params),
        seq(sequence),
        h(head),
        deltas_of_head(deltas + head),
        V(p.q.size[3]),
        Vp(round_up_lanes<T>(V)),
        s(scratch, V, Vp) {}

  // dq of the queries [t0, t0 + n).
  void query_tile(int64_t t0, int64_t n) {
    load_queries(t0, n);
    for (int64_t t = 0; t < n; ++t) {
      load_rows(s.row, Vp, p.out, seq.tokens.batch, seq.tokens.begin + t0 + t, 1, h, T(1));
      s.delta[t] = dot(s.row, s.row_v + t * Vp, Vp);
    }
    transpose(s.column_qk, s.row_qk, Vp, n, V);
    transpose(s.column_v, s.row_v, Vp, n, V);
    clear(s.dqk, n);
    clear(s.mean_key, n);
    for (int c = 0; c < kChunk; ++c) s.error[c] = 0;
    const int64_t first_key = max_of(t0 - seq.window + 1, -seq.past);
    for (int64_t s0 = first_key; s0 < t0 + n; s0 += kRowBlock) {
      const int64_t rows = min_of(kRowBlock, t0 + n - s0);
      const Band band = {s0 - t0, seq.window};
      seq.load_keys(s.row_qk, Vp, p.k, p.initial_k_cache, s0, rows, h);
      seq.load_keys(s.row_v, Vp, p.v, p.initial_v_cache, s0, rows, h);
      score_gradients<false>(band, rows, n);
      add_visible(band, rows, n, Vp, s.dscores, s.row_qk, s.part, s.dqk);
      add_errors(band, rows, n);
      add_visible(band, rows, n, Vp, s.weights, s.row_qk, s.part, s.mean_key);
    }
    for (int64_t c = 0; c < n; ++c) {
      *delta_at(t0 + c) = s.delta[c] + s.error[c];
      for (int64_t i = c * Vp; i < (c + 1) * Vp; ++i) {
        s.dqk[i] = (s.dqk[i] - s.error[c] * s.mean_key[i]) * T(p.scale);
      }
    }
    store_rows(p.dq, seq.tokens.batch, seq.tokens.begin + t0, n, h, s.dqk, Vp);
  }

  // dk and dv of the keys [s0, s0 + n), which are tokens.
  void key_tile(int64_t s0, int64_t n) {
    key_gradients(s0, n);
    store_rows(p.dk, seq.tokens.batch, seq.tokens.begin + s0, n, h, s.dqk, Vp);
    store_rows(p.dv, seq.tokens.batch, seq.tokens.begin + s0, n, h, s.dv, Vp);
  }

  // The gradient of the initial slots of keys [s0, s0 + n), s0 + n <= 0; 0 where there was no key.
  void ring_tile(int64_t s0, int64_t n) {
    const int64_t missing = min_of(n, max_of(0, -seq.past - s0));
    clear(s.dqk, missing);
    clear(s.dv, missing);
    for (int64_t i = 0; i < missing; ++i) store_slot(s0 + i, i);
    if (missing == n) return;
    key_gradients(s0 + missing, n - missing);
    for (int64_t i = 0; i < n - missing; ++i) store_slot(s0 + missing + i, i);
  }

 private:
  void clear(T* rows, int64_t n) const {
    for (int64_t i = 0; i < n * Vp; ++i) rows[i] = 0;
  }

  void store_slot(int64_t key, int64_t i) const {
    const int64_t slot = seq.slot(key);
    store_rows(p.dinitial_k_cache, seq.n, slot, 1, h, s.dqk + i * Vp, Vp);
    store_rows(p.dinitial_v_cache, seq.n, slot, 1, h, s.dv + i * Vp, Vp);
  }

  T* delta_at(int64_t t) const {
    const int64_t token = seq.tokens.batch * p.q.size[1] + seq.tokens.begin + t;
    return deltas_of_head + token * p.q.size[2];
  }

  // Scaled q and dout into row_qk and row_v, and lse.
  void load_queries(int64_t t0, int64_t n) const {
    const int64_t b = seq.tokens.batch, token = seq.tokens.begin + t0;
    load_rows(s.row_qk, Vp, p.q, b, token, n, h, T(p.scale));
    load_rows(s.row_v, Vp, p.dout, b, token, n, h, T(1));
    for (int64_t t = 0; t < n; ++t) {
      load(s.lse + t, p.lse.data, p.lse.dtype, offset_of(p.lse, b, token + t, h), 1);
    }
  }

  // dqk, dv <- the gradients of keys [s0, s0 + n): from the queries that see them, and from the
  // final ring for those it holds.
  void key_gradients(int64_t s0, int64_t n) const {
    clear(s.dqk, n);
    clear(s.dv, n);
    seq.load_keys(s.row_qk, Vp, p.k, p.initial_k_cache, s0, n, h);
    seq.load_keys(s.row_v, Vp, p.v, p.initial_v_cache, s0, n, h);
    transpose(s.column_qk, s.row_qk, Vp, n, V);
    transpose(s.column_v, s.row_v, Vp, n, V);
    const int64_t end = min_of(s0 + n - 1 + seq.window, seq.length);
    for (int64_t t0 = max_of(s0, 0); t0 < end; t0 += kRowBlock) {
      const int64_t rows = min_of(kRowBlock, end - t0);
      const Band band = {t0 - s0 - seq.window + 1, seq.window};
      load_queries(t0, rows);
      for (int64_t t = 0; t < rows; ++t) s.delta[t] = *delta_at(t0 + t);
      score_gradients<true>(band, rows, n);
      add_visible(band, rows, n, Vp, s.weights, s.row_v, s.part, s.dv);
      add_visible(band, rows, n, Vp, s.dscores, s.row_qk, s.part, s.dqk);
    }
    add_final_ring(s.dqk, p.dfinal_k_cache, s0, n);
    add_final_ring(s.dv, p.dfinal_v_cache, s0, n);
  }

  void add_final_ring(T* rows, const TensorView& dfinal, int64_t s0, int64_t n) const {
    if (dfinal.rank < 0) return;
    for (int64_t i = max_of(0, seq.length - p.window - s0); i < n; ++i) {
      load_rows(s.row, Vp, dfinal, seq.n, seq.slot(s0 + i), 1, h, T(1));
      for (int64_t c = 0; c < Vp; ++c) rows[i * Vp + c] += s.row[c];
    }
  }

  // weights = p_ts and dscores = ds_ts where visible; what the rest of the groups gets is not read.
  template <bool kRowsAreQueries>
  void score_gradients(Band band, int64_t rows, int64_t columns) const {
    for_each_group<T>(band, rows, columns, [&](int64_t r, int64_t n, int64_t c0, int64_t c1) {
      const int64_t at = r * kChunk + c0;
      gemm(n, c1 - c0, {0, V}, s.row_qk + r * Vp, Vp, 1, s.column_qk + c0, kChunk, s.weights + at,
           kChunk, false);
      gemm(n, c1 - c0, {0, V}, s.row_v + r * Vp, Vp, 1, s.column_v + c0, kChunk, s.dscores + at,
           kChunk, false);
      for (int64_t i = r; i < r + n; ++i) {
        T* __restrict weight = s.weights + i * kChunk;
        T* __restrict dscore = s.dscores + i * kChunk;
        const T* __restrict lse = s.lse, * __restrict delta = s.delta;
        for (int64_t c = c0; c < c1; ++c) {
          const int64_t query = kRowsAreQueries ? i : c;
          weight[c] = exp_fast(weight[c] - lse[query]);
          dscore[c] = weight[c] * (dscore[c] - delta[query]);
        }
      }
    });
  }

  // error[t] += sum_s ds_ts over the visible rows s.
  void add_errors(Band band, int64_t rows, int64_t columns) const {
    for (int64_t i = 0; i < rows; ++i) {
      const T* dscore = s.dscores + i * kChunk;
      const int64_t first = max_of(0, i + band.first);
      const int64_t end = min_of(columns, i + band.first + band.window);
      for (int64_t c = first; c < end; ++c) s.error[c] += dscore[c];
    }
  }

  const SlidingWindowBackwardParams& p;
  const WindowSequence& seq;
  const int64_t h;
  T* const deltas_of_head;
  const int64_t V, Vp;
  const Buffers<T> s;
};

template <class T>
bool run(const SlidingWindowBackwardParams& p, ParallelFor parallel, T* deltas) {
  const int64_t V = p.q.size[3], H = p.q.size[2];
  const int64_t scratch_size = Buffers<T>(nullptr, V, round_up_lanes<T>(V)).size;
  const auto queries = [&](const WindowSequence& seq, int64_t t0, int64_t n, int64_t h,
                           T* scratch) {
    Backward<T>(p, seq, h, deltas, scratch).query_tile(t0, n);
  };
  const auto keys = [&](const WindowSequence& seq, int64_t t0, int64_t n, int64_t h, T* scratch) {
    Backward<T>(p, seq, h, deltas, scratch).key_tile(t0, n);
  };
  if (!for_each_tile<T>(p, parallel, scratch_size, queries)) return false;
  if (!for_each_tile<T>(p, parallel, scratch_size, keys)) return false;
  if (p.dinitial_k_cache.rank < 0) return true;

  const int64_t sequences = p.dinitial_k_cache.size[0], tiles = (p.window + kChunk - 1) / kChunk;
  const auto ring = [&](int64_t i, T* scratch) {
    const WindowSequence seq(p, i / H / tiles);
    const int64_t s0 = i / H % tiles * kChunk - p.window;
    Backward<T>(p, seq, i % H, deltas, scratch).ring_tile(s0, min_of(kChunk, -s0));
  };
  return for_each_task<T>(parallel, sequences * tiles * H, scratch_size, ring);
}

template <class T>
bool backward(const SlidingWindowBackwardParams& p, ParallelFor parallel) {
  const int64_t count = p.q.size[0] * p.q.size[1] * p.q.size[2];
  T* deltas = static_cast<T*>(malloc(count * sizeof(T) + 1));
  const bool done = deltas != nullptr && run(p, parallel, deltas);
  free(deltas);
  return done;
}

}  // namespace

bool sliding_window_attention_backward(const SlidingWindowBackwardParams& p, ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? backward<double>(p, parallel)
                                      : backward<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
