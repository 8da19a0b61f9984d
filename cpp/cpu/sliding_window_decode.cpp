// Sliding-window attention, one token. One task is one (row, head): q and k are rotated where the
// call has angles and rounded to their dtype, k and v go into the ring, then
// the keys the ring holds stream through in blocks with an online softmax. Slots fill up in order,
// so those present are always the first ones; their order does not matter.
#include <cfloat>
#include <cmath>

#include "exp.h"
#include "sliding_window.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
struct Buffers {
  T *q, *part, *out, *rows, *scores;
  int64_t size;

  Buffers(T* scratch, int64_t Vp) {
    Arena<T> arena{scratch};
    q = arena.take(Vp), part = arena.take(Vp), out = arena.take(Vp);
    rows = arena.take(kRowBlock * Vp), scores = arena.take(kRowBlock);
    size = arena.used;
  }
};

// x <- x rotated by the angles of row b, dim j < R with dim j + R.
template <class T>
void rotate(T* x, const TensorView& cos, const TensorView& sin, int64_t b) {
  if (cos.rank < 0) return;
  const T* c = static_cast<const T*>(cos.data) + b * cos.stride[0];
  const T* s = static_cast<const T*>(sin.data) + b * sin.stride[0];
  const int64_t R = cos.size[1];
  for (int64_t j = 0; j < R; ++j) {
    const T x1 = x[j], x2 = x[j + R];
    x[j] = x1 * c[j] - x2 * s[j];
    x[j + R] = x2 * c[j] + x1 * s[j];
  }
}

template <class T>
bool decode(const SlidingWindowDecodeParams& p, ParallelFor parallel) {
  constexpr int L = kLanes<T>;
  const int64_t B = p.q.size[0], H = p.q.size[1], V = p.q.size[2], W = p.k_cache.size[1];
  const int64_t Vp = round_up_lanes<T>(V), scratch_size = Buffers<T>(nullptr, Vp).size;
  return for_each_task<T>(parallel, B * H, scratch_size, [&](int64_t task, T* scratch) {
    const Buffers<T> s(scratch, Vp);
    const int64_t b = task / H, h = task % H, slot = slot_of(p.state_indices, b);
    const auto offset = [&](const TensorView& view) {
      return b * view.stride[0] + h * view.stride[1];
    };
    for (int64_t i = 0; i < Vp; ++i) s.q[i] = s.out[i] = 0;
    if (slot < 0) return store(p.out.data, p.out.dtype, offset(p.out), s.out, V);

    const int64_t position = load_index(p.positions, b), present = min_of(position, W - 1) + 1;
    load(s.rows, p.v.data, p.v.dtype, offset(p.v), V);
    store_rows(p.v_cache, slot, position % W, 1, h, s.rows, Vp);
    load(s.rows, p.k.data, p.k.dtype, offset(p.k), V);
    rotate(s.rows, p.cos, p.sin, b);
    store_rows(p.k_cache, slot, position % W, 1, h, s.rows, Vp);
    load(s.q, p.q.data, p.q.dtype, offset(p.q), V);
    rotate(s.q, p.cos, p.sin, b);
    store(s.rows, p.q.dtype, 0, s.q, V);  // rounded like k
    load(s.q, s.rows, p.q.dtype, 0, V);
    for (int64_t i = 0; i < V; ++i) s.q[i] *= T(p.scale);

    T max = T(-FLT_MAX), sum = 0;
    for (int64_t first = 0; first < present; first += kRowBlock) {
      const int64_t n = min_of(kRowBlock, present - first);
      load_rows(s.rows, Vp, p.k_cache, slot, first, n, h, T(1));
      T block_max = max;
      for (int64_t i = 0; i < n; ++i) {
        s.scores[i] = dot(s.q, s.rows + i * Vp, Vp);
        block_max = s.scores[i] > block_max ? s.scores[i] : block_max;
      }
      const T shrink = exp_fast(max - block_max);
      max = block_max;
      for (int64_t i = n; i < round_up_lanes<T>(n); ++i) s.scores[i] = T(-INFINITY);
      for (int64_t i = 0; i < n; i += L) {
        for (int c = 0; c < L; ++c) s.scores[i + c] = exp_fast(s.scores[i + c] - max);
      }
      T part_sum = 0;
      for (int64_t i = 0; i < n; ++i) part_sum += s.scores[i];
      sum = sum * shrink + part_sum;
      load_rows(s.rows, Vp, p.v_cache, slot, first, n, h, T(1));
      gemm(1, Vp, {0, n}, s.scores, n, 1, s.rows, Vp, s.part, Vp, false);
      for (int64_t i = 0; i < Vp; ++i) s.out[i] = s.out[i] * shrink + s.part[i];
    }
    const T inverse = 1 / sum;
    for (int64_t i = 0; i < V; ++i) s.out[i] *= inverse;
    store(p.out.data, p.out.dtype, offset(p.out), s.out, V);
  });
}

}  // namespace

bool sliding_window_decode(const SlidingWindowDecodeParams& p, ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? decode<double>(p, parallel) : decode<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
