// Linear attention, one token, with deferred writes of the state. One task is one (row, head).
// Until its ring is full, a row reads S and z and adds the waiting tokens one by one:
//   out = (phi(q) S + sum_t w_t v_t) / (phi(q) z + sum_t w_t),  w = 1 + s + s^2/2
// The call that fills the ring adds all of them to S and z, which are then written.
#include <cmath>

#include "element.h"
#include "tasks.h"
#include "taylor.h"

namespace based::cpu::BASED_ISA {
namespace {

// Row `slot`, head h of a state and of the ring that goes with it.
template <class T>
struct DeferredState {
  int64_t D, F, V, slot, h;
  T *S, *z;
  int64_t ld;  // from row to row of S
  const TensorView &ring_k, &ring_v;

  template <class Params>
  DeferredState(const Params& p, int64_t slot_, int64_t h_)
      : D(p.pending_k.size[3]),
        F(expanded_dim(D)),
        V(p.pending_v.size[3]),
        slot(slot_),
        h(h_),
        S(static_cast<T*>(p.kv_state.data) + slot * p.kv_state.stride[0] +
          h * p.kv_state.stride[1]),
        z(static_cast<T*>(p.k_state.data) + slot * p.k_state.stride[0] + h * p.k_state.stride[1]),
        ld(p.kv_state.stride[2]),
        ring_k(p.pending_k),
        ring_v(p.pending_v) {}

  int64_t place(const TensorView& ring, int64_t t) const {
    return slot * ring.stride[0] + t * ring.stride[1] + h * ring.stride[2];
  }
  void load_pending(int64_t t, T* k, T* v) const {
    load(k, ring_k.data, ring_k.dtype, place(ring_k, t), D);
    load(v, ring_v.data, ring_v.dtype, place(ring_v, t), V);
  }
  void store_pending(int64_t t, const T* k, const T* v) const {
    store(ring_k.data, ring_k.dtype, place(ring_k, t), k, D);
    store(ring_v.data, ring_v.dtype, place(ring_v, t), v, V);
  }

  // S += phi(k)^T v, z += phi(k) for n tokens; k (n, D) carries sqrt(scale). phi holds n F values.
  void take_in(int64_t n, const T* k, const T* v, T* phi) const {
    for (int64_t t = 0; t < n; ++t) taylor_tile<T, 1>(D, k + t * D, phi + t * F);
    for (int64_t f = 0; f < F; ++f) {
      for (int64_t t = 0; t < n; ++t) {
        z[f] += phi[t * F + f];
        add(S + f * ld, phi[t * F + f], v + t * V);
      }
    }
  }

  // target += factor row
  void add(T* __restrict target, T factor, const T* __restrict row) const {
    for (int64_t i = 0; i < V; ++i) target[i] += factor * row[i];
  }
};

template <class T>
bool decode(const LinearAttentionDecodeDeferredParams& p, ParallelFor parallel) {
  const int64_t B = p.q.size[0], H = p.q.size[1], D = p.q.size[2], V = p.v.size[2];
  const int64_t F = expanded_dim(D), C = p.pending_k.size[1];
  const T root = T(std::sqrt(p.scale));
  const int64_t scratch_size = D + F + V + C * (D + V + F);
  return for_each_task<T>(parallel, B * H, scratch_size, [&](int64_t task, T* scratch) {
    T *q = scratch, *phi_q = q + D, *out = phi_q + F, *k = out + V, *v = k + C * D,
      *phi = v + C * V;
    const int64_t b = task / H, h = task % H, slot = slot_of(p.state_indices, b);
    const auto offset = [&](const TensorView& view) {
      return b * view.stride[0] + h * view.stride[1];
    };
    for (int64_t i = 0; i < V; ++i) out[i] = 0;
    if (slot < 0) return store(p.out.data, p.out.dtype, offset(p.out), out, V);

    const DeferredState<T> state(p, slot, h);
    const int64_t fill = load_index(p.fill, b), count = fill + 1;
    for (int64_t t = 0; t < fill; ++t) state.load_pending(t, k + t * D, v + t * V);
    load(k + fill * D, p.k.data, p.k.dtype, offset(p.k), D);
    load(v + fill * V, p.v.data, p.v.dtype, offset(p.v), V);
    if (count < C) state.store_pending(fill, k + fill * D, v + fill * V);
    load(q, p.q.data, p.q.dtype, offset(p.q), D);
    for (int64_t j = 0; j < D; ++j) q[j] *= root;
    for (int64_t i = 0; i < count * D; ++i) k[i] *= root;
    taylor_tile<T, 1>(D, q, phi_q);

    T den = 0;
    if (count == C) {
      state.take_in(count, k, v, phi);
    } else {
      for (int64_t t = 0; t < count; ++t) {
        T s = 0;
        for (int64_t j = 0; j < D; ++j) s += q[j] * k[t * D + j];
        const T w = 1 + s + s * s / 2;
        state.add(out, w, v + t * V);
        den += w;
      }
    }
    for (int64_t f = 0; f < F; ++f) {
      state.add(out, phi_q[f], state.S + f * state.ld);
      den += phi_q[f] * state.z[f];
    }
    if (p.normalize) {
      const T inverse = 1 / den;
      for (int64_t i = 0; i < V; ++i) out[i] *= inverse;
    }
    store(p.out.data, p.out.dtype, offset(p.out), out, V);
  });
}

template <class T>
bool fold(const LinearAttentionFoldParams& p, ParallelFor parallel) {
  const int64_t B = p.fill.size[0], C = p.pending_k.size[1], H = p.pending_k.size[2];
  const int64_t D = p.pending_k.size[3], V = p.pending_v.size[3], F = expanded_dim(D);
  const T root = T(std::sqrt(p.scale));
  return for_each_task<T>(parallel, B * H, C * (D + V + F), [&](int64_t task, T* scratch) {
    T *k = scratch, *v = k + C * D, *phi = v + C * V;
    const int64_t b = task / H, slot = slot_of(p.state_indices, b), n = load_index(p.fill, b);
    if (slot < 0) return;
    const DeferredState<T> state(p, slot, task % H);
    for (int64_t t = 0; t < n; ++t) state.load_pending(t, k + t * D, v + t * V);
    for (int64_t i = 0; i < n * D; ++i) k[i] *= root;
    state.take_in(n, k, v, phi);
  });
}

}  // namespace

bool linear_attention_decode_deferred(const LinearAttentionDecodeDeferredParams& p,
                                      ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? decode<double>(p, parallel) : decode<float>(p, parallel);
}

bool linear_attention_fold(const LinearAttentionFoldParams& p, ParallelFor parallel) {
  return p.pending_k.dtype == DType::kFloat64 ? fold<double>(p, parallel)
                                              : fold<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
