// What forward and backward of linear attention share: the shape of a chunk, its loads and stores,
// and its score tile.
//
// Tokens go chunk by chunk. q and k are scaled by sqrt(scale) when loaded, so that a score is a
// plain dot product. Tiles that are multiplied as A operands over features are feature-major: (D,
// kChunk) and (F, kChunk). v-like tiles are (kChunk, Vp) rows, Vp = V rounded up to whole vectors,
// padding 0.
#pragma once

#include <cmath>

#include "element.h"
#include "gemm.h"
#include "simd.h"
#include "tasks.h"
#include "taylor.h"

namespace based::cpu::BASED_ISA {

constexpr int kChunk = 64;
constexpr int kScoreRows = 16;  // granularity at which the score tile follows the diagonal

// Hands out parts of one scratch allocation; with a null base it only counts.
template <class T>
struct Arena {
  T* base;
  int64_t used = 0;

  T* take(int64_t elements) {
    T* part = base == nullptr ? nullptr : base + used;
    used += round_up_lanes<T>(elements);
    return part;
  }
};

// Element offset of head h at token t of batch row b.
inline int64_t offset_of(const TensorView& view, int64_t b, int64_t t, int64_t h) {
  return b * view.stride[0] + t * view.stride[1] + h * view.stride[2];
}

// rows (kChunk, ld) <- factor * view[b, t0 : t0 + n, h]; columns past the width are 0.
template <class T>
void load_rows(T* rows, int64_t ld, const TensorView& view, int64_t b, int64_t t0, int64_t n,
               int64_t h, T factor) {
  const int64_t width = view.size[3];
  for (int64_t t = 0; t < n; ++t) {
    T* row = rows + t * ld;
    load(row, view.data, view.dtype, offset_of(view, b, t0 + t, h), width);
    if (factor != T(1)) {
      for (int64_t i = 0; i < width; ++i) row[i] *= factor;
    }
    for (int64_t i = width; i < ld; ++i) row[i] = 0;
  }
}

template <class T>
void store_rows(const TensorView& view, int64_t b, int64_t t0, int64_t n, int64_t h, const T* rows,
                int64_t ld) {
  for (int64_t t = 0; t < n; ++t) {
    store(view.data, view.dtype, offset_of(view, b, t0 + t, h), rows + t * ld, view.size[3]);
  }
}

// columns (width, kChunk) <- the first n rows, transposed; columns past n are 0.
template <class T>
void transpose(T* columns, const T* rows, int64_t ld, int64_t n, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    T* column = columns + i * kChunk;
    for (int64_t t = 0; t < n; ++t) column[t] = rows[t * ld + i];
    for (int64_t t = n; t < kChunk; ++t) column[t] = 0;
  }
}

// tile (n, kChunk) = rows of A (n, K) times B (K, kChunk), at least on and below the diagonal.
template <class T>
void lower_product(T* tile, int64_t n, int64_t K, const T* a, int64_t a_row, int64_t a_column,
                   const T* b) {
  for (int64_t t = 0; t < n; t += kScoreRows) {
    const int64_t rows = n - t < kScoreRows ? n - t : kScoreRows;
    gemm(rows, t + kScoreRows, {0, K}, a + t * a_row, a_row, a_column, b, kChunk, tile + t * kChunk,
         kChunk, false);
  }
}

// state (F, V) in memory <-> sS (F, Vp), head h of row n; a state that is not given reads as 0.
template <class T>
void load_state(T* sS, int64_t ld, T* sz, const TensorView& kv, const TensorView& k, int64_t n,
                int64_t h, int64_t F, int64_t V) {
  if (kv.rank < 0) {
    for (int64_t i = 0; i < F * ld; ++i) sS[i] = 0;
    for (int64_t f = 0; f < F; ++f) sz[f] = 0;
    return;
  }
  for (int64_t f = 0; f < F; ++f) {
    load(sS + f * ld, kv.data, kv.dtype, n * kv.stride[0] + h * kv.stride[1] + f * kv.stride[2], V);
    for (int64_t i = V; i < ld; ++i) sS[f * ld + i] = 0;
  }
  load(sz, k.data, k.dtype, n * k.stride[0] + h * k.stride[1], F);
}

template <class T>
void store_state(const TensorView& kv, const TensorView& k, int64_t n, int64_t h, int64_t F,
                 int64_t V, const T* sS, int64_t ld, const T* sz) {
  if (kv.rank < 0) return;
  for (int64_t f = 0; f < F; ++f) {
    store(kv.data, kv.dtype, n * kv.stride[0] + h * kv.stride[1] + f * kv.stride[2], sS + f * ld,
          V);
  }
  store(k.data, k.dtype, n * k.stride[0] + h * k.stride[1], sz, F);
}

// den[t] = <phi[:, t], z>
template <class T>
void read_k_state(T* __restrict den, const T* __restrict phi, const T* __restrict z, int64_t F) {
  for (int t = 0; t < kChunk; ++t) den[t] = 0;
  for (int64_t f = 0; f < F; ++f) {
    for (int t = 0; t < kChunk; ++t) den[t] += phi[f * kChunk + t] * z[f];
  }
}

// The state takes in n tokens: S += phi (F, n) v (n, Vp), z[f] += sum_t phi[f, t] weight[t].
template <class T>
void update_state(T* sS, T* sz, const T* phi, const T* v, const T* weight, int64_t n, int64_t F,
                  int64_t Vp) {
  gemm(F, Vp, {0, n}, phi, kChunk, 1, v, Vp, sS, Vp, true);
  for (int64_t f = 0; f < F; ++f) {
    T sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += phi[f * kChunk + t] * weight[t];
    sz[f] += sum;
  }
}

}  // namespace based::cpu::BASED_ISA
