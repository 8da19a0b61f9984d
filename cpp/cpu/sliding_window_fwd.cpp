// Sliding-window attention, forward. One task is one (tile of kChunk queries, head); keys stream
// through in blocks, softmax is online:
//   m <- max(m, scores),  l <- l e^(m_old - m) + sum e^(scores - m),  out likewise;  out / l
// Scores are kept keys by queries: the queries are then the lanes of every softmax step.
// Everything is T: float, or double for float64.
#include <cfloat>
#include <cmath>

#include "exp.h"
#include "sliding_window.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
struct Buffers {
  T *q, *qT, *k, *v, *scores, *part, *out, *max, *sum, *part_sum, *shrink;
  int64_t size;

  Buffers(T* scratch, int64_t V, int64_t Vp) {
    Arena<T> arena{scratch};
    q = arena.take(kChunk * Vp), qT = arena.take(V * kChunk);
    k = arena.take(kRowBlock * Vp), v = arena.take(kRowBlock * Vp);
    scores = arena.take(kRowBlock * kChunk), part = arena.take(kChunk * Vp);
    out = arena.take(kChunk * Vp), part_sum = arena.take(kChunk);
    max = arena.take(kChunk), sum = arena.take(kChunk), shrink = arena.take(kChunk);
    size = arena.used;
  }
};

// scores (rows, kChunk) = k q^T where visible, -infinity in the rest of the groups.
template <class T>
void masked_scores(Band band, int64_t rows, int64_t columns, int64_t V, int64_t Vp, const T* k,
                   const T* qT, T* scores) {
  for_each_group<T>(band, rows, columns, [&](int64_t r, int64_t n, int64_t c0, int64_t c1) {
    gemm(n, c1 - c0, {0, V}, k + r * Vp, Vp, 1, qT + c0, kChunk, scores + r * kChunk + c0, kChunk,
         false);
    for (int64_t i = r; i < r + n; ++i) {
      T* row = scores + i * kChunk;
      const int64_t first = i + band.first;
      for (int64_t c = c0; c < min_of(first, c1); ++c) row[c] = T(-INFINITY);
      for (int64_t c = max_of(c0, first + band.window); c < c1; ++c) row[c] = T(-INFINITY);
    }
  });
}

template <class T>
void raise_max(Band band, int64_t rows, int64_t columns, const T* scores, T* max) {
  for_each_group<T>(band, rows, columns, [&](int64_t r, int64_t n, int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c += kLanes<T>) {
      Vector<T> m = load_vector(max + c);
      for (int64_t i = r; i < r + n; ++i) {
        const Vector<T> s = load_vector(scores + i * kChunk + c);
        m = s > m ? s : m;
      }
      store_vector(max + c, m);
    }
  });
}

// scores <- e^(scores - max), added to sum.
template <class T>
void exponentials(Band band, int64_t rows, int64_t columns, T* __restrict scores,
                  const T* __restrict max, T* __restrict sum) {
  for_each_group<T>(band, rows, columns, [&](int64_t r, int64_t n, int64_t c0, int64_t c1) {
    for (int64_t i = r; i < r + n; ++i) {
      T* row = scores + i * kChunk;
      for (int64_t c = c0; c < c1; ++c) {
        const T weight = exp_fast(row[c] - max[c]);
        row[c] = weight;
        sum[c] += weight;
      }
    }
  });
}

template <class T>
bool forward(const SlidingWindowParams& p, ParallelFor parallel) {
  const int64_t V = p.q.size[3], Vp = round_up_lanes<T>(V);
  const auto tile = [&](const WindowSequence& seq, int64_t t0, int64_t n, int64_t h, T* scratch) {
    const Buffers<T> s(scratch, V, Vp);
    const int64_t token = seq.tokens.begin + t0;
    load_rows(s.q, Vp, p.q, seq.tokens.batch, token, n, h, T(p.scale));
    transpose(s.qT, s.q, Vp, n, V);
    for (int64_t i = 0; i < n * Vp; ++i) s.out[i] = 0;
    for (int c = 0; c < kChunk; ++c) {
      s.max[c] = T(-FLT_MAX);  // finite, so that -infinity - max is -infinity
      s.sum[c] = 0;
    }
    const int64_t first_key = max_of(t0 - seq.window + 1, -seq.past);
    for (int64_t s0 = first_key; s0 < t0 + n; s0 += kRowBlock) {
      const int64_t rows = min_of(kRowBlock, t0 + n - s0);
      const Band band = {s0 - t0, seq.window};
      seq.load_keys(s.k, Vp, p.k, p.initial_k_cache, s0, rows, h);
      seq.load_keys(s.v, Vp, p.v, p.initial_v_cache, s0, rows, h);
      masked_scores(band, rows, n, V, Vp, s.k, s.qT, s.scores);
      for (int c = 0; c < kChunk; ++c) s.shrink[c] = s.max[c];
      raise_max(band, rows, n, s.scores, s.max);
      if (s0 > first_key) {
        for (int c = 0; c < kChunk; ++c) s.shrink[c] = exp_fast(s.shrink[c] - s.max[c]);
        for (int c = 0; c < kChunk; ++c) s.sum[c] *= s.shrink[c];
        for (int64_t c = 0; c < n; ++c) {
          for (int64_t i = 0; i < Vp; ++i) s.out[c * Vp + i] *= s.shrink[c];
        }
      }
      for (int c = 0; c < kChunk; ++c) s.part_sum[c] = 0;
      exponentials(band, rows, n, s.scores, s.max, s.part_sum);
      for (int c = 0; c < kChunk; ++c) s.sum[c] += s.part_sum[c];
      add_visible(band, rows, n, Vp, s.scores, s.v, s.part, s.out);
    }
    for (int64_t c = 0; c < n; ++c) {
      const T inverse = 1 / s.sum[c], lse = s.max[c] + std::log(s.sum[c]);
      for (int64_t i = 0; i < Vp; ++i) s.out[c * Vp + i] *= inverse;
      store(p.lse.data, p.lse.dtype, offset_of(p.lse, seq.tokens.batch, token + c, h), &lse, 1);
    }
    store_rows(p.out, seq.tokens.batch, token, n, h, s.out, Vp);
  };
  return for_each_tile<T>(p, parallel, Buffers<T>(nullptr, V, Vp).size, tile);
}

// The final ring: the last W keys, each in its slot, 0 in slots never written.
template <class T>
bool write_final_ring(const SlidingWindowParams& p, ParallelFor parallel) {
  const int64_t V = p.q.size[3], H = p.q.size[2], W = p.window;
  const auto one_head = [&](int64_t task, T* row) {
    const WindowSequence seq(p, task / H);
    const int64_t h = task % H;
    const auto copy = [&](const TensorView& final, const TensorView& view, const TensorView& ring) {
      for (int64_t s = seq.length - W; s < seq.length; ++s) {
        if (s >= -seq.past) {
          seq.load_keys(row, V, view, ring, s, 1, h);
        } else {
          for (int64_t i = 0; i < V; ++i) row[i] = 0;
        }
        store_rows(final, seq.n, seq.slot(s), 1, h, row, V);
      }
    };
    copy(p.final_k_cache, p.k, p.initial_k_cache);
    copy(p.final_v_cache, p.v, p.initial_v_cache);
  };
  const int64_t sequences = sequence_count(p.cu_seqlens, p.q.size[0]);
  return for_each_task<T>(parallel, sequences * H, V, one_head);
}

void write_final_positions(const SlidingWindowParams& p) {
  const TensorView &from = p.initial_positions, &to = p.final_positions;
  for (int64_t n = 0; n < to.size[0]; ++n) {
    const Sequence seq = sequence(p.cu_seqlens, n, p.q.size[1]);
    const int64_t position = (from.rank < 0 ? 0 : load_index(from, n)) + seq.end - seq.begin;
    if (to.dtype == DType::kInt32) {
      static_cast<int32_t*>(to.data)[n * to.stride[0]] = static_cast<int32_t>(position);
    } else {
      static_cast<int64_t*>(to.data)[n * to.stride[0]] = position;
    }
  }
}

template <class T>
bool run(const SlidingWindowParams& p, ParallelFor parallel) {
  if (!forward<T>(p, parallel)) return false;
  if (p.final_k_cache.rank < 0) return true;
  write_final_positions(p);
  return write_final_ring<T>(p, parallel);
}

}  // namespace

bool sliding_window_attention(const SlidingWindowParams& p, ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? run<double>(p, parallel) : run<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
