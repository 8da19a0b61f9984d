// Linear attention, one token. One task is one (row, head):
//   S += phi(k)^T v,  z += phi(k),  out = phi(q) S / phi(q) z
// A panel of S columns stays in registers' reach: every state element is read and written once.
#include <cmath>

#include "element.h"
#include "simd.h"
#include "tasks.h"
#include "taylor.h"

namespace based::cpu::BASED_ISA {
namespace {

// out[n] = sum_f phi_q[f] S[f, n] after S[f, n] += phi_k[f] v[n], n < kVectors vectors of L lanes.
template <class T, int kVectors>
void panel(T* S, int64_t ld, int64_t F, const T* phi_q, const T* phi_k, const T* v, T* out) {
  constexpr int L = kLanes<T>;
  Vector<T> rv[kVectors], sum[kVectors] = {};
  for (int n = 0; n < kVectors; ++n) rv[n] = load_vector(v + n * L);
  for (int64_t f = 0; f < F; ++f, S += ld) {
    for (int n = 0; n < kVectors; ++n) {
      const Vector<T> state = load_vector(S + n * L) + rv[n] * phi_k[f];
      store_vector(S + n * L, state);
      sum[n] += state * phi_q[f];
    }
  }
  for (int n = 0; n < kVectors; ++n) store_vector(out + n * L, sum[n]);
}

template <class T>
void tail(T* S, int64_t ld, int64_t F, const T* phi_q, const T* phi_k, const T* v, T* out,
          int64_t columns) {
  for (int64_t i = 0; i < columns; ++i) {
    T sum = 0;
    for (int64_t f = 0; f < F; ++f) {
      T& state = S[f * ld + i];
      state += phi_k[f] * v[i];
      sum += state * phi_q[f];
    }
    out[i] = sum;
  }
}

template <class T>
bool decode(const LinearAttentionDecodeParams& p, ParallelFor parallel) {
  constexpr int L = kLanes<T>;
  const int64_t B = p.q.size[0], H = p.q.size[1], D = p.q.size[2], V = p.v.size[2];
  const int64_t F = expanded_dim(D), ld = p.kv_state.stride[2];
  const T root = T(std::sqrt(p.scale));
  return for_each_task<T>(parallel, B * H, 2 * F + D + 2 * V, [&](int64_t task, T* scratch) {
    T *phi_q = scratch, *phi_k = phi_q + F, *x = phi_k + F, *v = x + D, *out = v + V;
    const int64_t b = task / H, h = task % H, slot = slot_of(p.state_indices, b);
    const auto offset = [&](const TensorView& view) {
      return b * view.stride[0] + h * view.stride[1];
    };
    if (slot < 0) {
      for (int64_t i = 0; i < V; ++i) out[i] = 0;
      return store(p.out.data, p.out.dtype, offset(p.out), out, V);
    }
    const auto expand = [&](const TensorView& view, T* phi) {
      load(x, view.data, view.dtype, offset(view), D);
      for (int64_t j = 0; j < D; ++j) x[j] *= root;
      taylor_tile<T, 1>(D, x, phi);
    };
    expand(p.q, phi_q);
    expand(p.k, phi_k);
    load(v, p.v.data, p.v.dtype, offset(p.v), V);

    T* z = static_cast<T*>(p.k_state.data) + slot * p.k_state.stride[0] + h * p.k_state.stride[1];
    T den = 0;
    for (int64_t f = 0; f < F; ++f) {
      z[f] += phi_k[f];
      den += z[f] * phi_q[f];
    }
    T* S =
        static_cast<T*>(p.kv_state.data) + slot * p.kv_state.stride[0] + h * p.kv_state.stride[1];
    int64_t i = 0;
    for (; i + 4 * L <= V; i += 4 * L) {
      panel<T, 4>(S + i, ld, F, phi_q, phi_k, v + i, out + i);
    }
    for (; i + L <= V; i += L) panel<T, 1>(S + i, ld, F, phi_q, phi_k, v + i, out + i);
    tail(S + i, ld, F, phi_q, phi_k, v + i, out + i, V - i);
    if (p.normalize) {
      const T inverse = 1 / den;
      for (int64_t c = 0; c < V; ++c) out[c] *= inverse;
    }
    store(p.out.data, p.out.dtype, offset(p.out), out, V);
  });
}

}  // namespace

bool linear_attention_decode(const LinearAttentionDecodeParams& p, ParallelFor parallel) {
  return p.q.dtype == DType::kFloat64 ? decode<double>(p, parallel) : decode<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
