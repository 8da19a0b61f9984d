// What forward and backward of linear attention share: the shape of a chunk, its loads and stores,
// and its score tile.
//
// Tokens go chunk by chunk. q and k are scaled by sqrt(scale) when loaded, so that a score is a
// plain dot product. Tiles that are multiplied as A operands over features are feature-major: (D,
// kChunk) and (F, kChunk). v-like tiles are (kChunk, Vp) rows, Vp = V rounded up to whole vectors,
// padding 0.
#pragma once

#include <cmath>

#include "gemm.h"
#include "tasks.h"
#include "taylor.h"
#include "tiles.h"

namespace based::cpu::BASED_ISA {

constexpr int kScoreRows = 16;  // granularity at which the score tile follows the diagonal

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
