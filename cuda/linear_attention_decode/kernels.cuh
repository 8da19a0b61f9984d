// Linear attention, one token per row, plain and with deferred writes of the state.
//
// Memory-bound: the state (F, V) of a head is read once, and written once in the steps that fold.
// One block per (row, head). Its threads form `groups` rows of `columns` vectors; a thread keeps
// its columns and walks the rows f = group, group + groups, ... with kBatch of them in flight, so
// that a warp reads neighbouring 16-byte vectors. Everything is fp32; out is rounded once.
#pragma once

#include "linear_attention_decode/tuning.h"
#include "primitives/decode_row.cuh"
#include "primitives/element.cuh"
#include "primitives/taylor.cuh"

namespace based::cuda {

struct DecodeArgs {
  const void *q, *k;            // (B, H, D)
  const void* v;                // (B, H, V)
  void* out;                    // (B, H, V)
  float *kv_state, *k_state;    // (slots, H, F, V), (slots, H, F)
  void *pending_k, *pending_v;  // (slots, C, H, D), (slots, C, H, V)
  int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];
  int64_t kv_stride[3], z_stride[2];
  int64_t pending_k_stride[3], pending_v_stride[3];
  IndexVector state_indices, fill;  // (B,)
  int64_t slots, heads;
  int D, F, V, capacity;
  int columns, groups;  // of a block
  float root, scale;    // sqrt(scale), scale
  bool normalize;
};

// kVec neighbouring elements of a row of the state.
template <int kVec>
struct alignas(4 * kVec) StateVector {
  float x[kVec];
};

template <int kVec>
__device__ __forceinline__ StateVector<kVec> load_state(const float* source) {
  return *reinterpret_cast<const StateVector<kVec>*>(source);
}

template <int kVec>
__device__ __forceinline__ void store_state(float* target, const StateVector<kVec>& v) {
  *reinterpret_cast<StateVector<kVec>*>(target) = v;
}

// Sum over the block, known to every thread after the next barrier but one.
struct BlockSum {
  float* warps;  // one float for every warp, in shared memory

  __device__ __forceinline__ void add(float x) const {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  }
  __device__ __forceinline__ float total() const {
    float sum = 0;
    for (int w = 0; w < static_cast<int>(blockDim.x / 32); ++w) sum += warps[w];
    return sum;
  }
};

// A row's tokens that the state does not hold yet: the pending ones, oldest first, then this
// call's.
template <class Element>
struct Tokens {
  const Element *ring_k, *ring_v, *k, *v;
  int64_t k_stride, v_stride;
  int pending;

  __device__ __forceinline__ int count() const { return pending + 1; }
  __device__ __forceinline__ const Element* key(int t) const {
    return t < pending ? ring_k + t * k_stride : k;
  }
  __device__ __forceinline__ const Element* value(int t) const {
    return t < pending ? ring_v + t * v_stride : v;
  }
};

__device__ __forceinline__ float taylor_value(const TaylorRow& row, const float* x) {
  float value = row.coefficient;
  if (row.i >= 0) value *= x[row.i];
  if (row.j >= 0) value *= x[row.j];
  return value;
}

template <class Element>
__device__ __forceinline__ void fill_row(Element* out, int V, float value) {
  for (int i = threadIdx.x; i < V; i += blockDim.x) out[i] = from_float<Element>(value);
}

// Floats of shared memory: phi(q), the row's q and keys, weights, phi of keys, partial sums.
__host__ __device__ constexpr int decode_phi_rows(int F, int groups, bool deferred) {
  return deferred ? kFoldTokens * kDecodeBatch * groups : F;
}
__host__ __device__ constexpr int decode_shared_floats(int F, int D, int capacity, int columns,
                                                       int vec, int groups, bool deferred) {
  return F + D + capacity * D + capacity + decode_phi_rows(F, groups, deferred) +
         columns * vec * groups + kDecodeThreads / 32;
}

// Plain (kDeferred = false):
//   S += phi(k)^T v,  z += phi(k),  out = phi(q) S / phi(q) z
// Deferred: n of the row's last tokens wait in its ring of C.
//   n + 1 < C:  out = (phi(q) S + sum_t w_t v_t) / (phi(q) z + sum_t w_t), w = 1 + s + s^2/2, over
//               the n + 1 waiting tokens; k and v go to place n of the ring, S and z stay.
//   n + 1 = C:  S and z take in the C tokens and are written; then as in the plain form.
template <class Element, int kVec, bool kDeferred>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSM<kDeferred>)
    linear_attention_decode_kernel(const __grid_constant__ DecodeArgs a) {
  constexpr int kBatch = kDecodeBatch;
  const int64_t b = blockIdx.x / a.heads, h = blockIdx.x % a.heads;
  const int tid = threadIdx.x, D = a.D, F = a.F, V = a.V, groups = a.groups;
  Element* gOut = static_cast<Element*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1];

  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  if (row.kind != RowKind::kRun) return fill_row(gOut, V, filler(row.kind));
  const int64_t slot = row.slot;
  int pending = 0;
  if constexpr (kDeferred) {
    const int64_t n = a.fill[b];
    if (n < 0 || n >= a.capacity) return fill_row(gOut, V, filler(RowKind::kBad));
    pending = static_cast<int>(n);
  }
  const bool fold = !kDeferred || pending + 1 == a.capacity;

  // The first rows of the state are on their way before anything else is needed.
  float* gS = a.kv_state + slot * a.kv_stride[0] + h * a.kv_stride[1];  // (F, V)
  float* gZ = a.k_state + slot * a.z_stride[0] + h * a.z_stride[1];     // (F,)
  const int group = tid / a.columns, first_column = tid % a.columns * kVec;
  StateVector<kVec> rS[kBatch];
  const auto load_rows = [&](int first, int column) {
#pragma unroll
    for (int r = 0; r < kBatch; ++r) {
      const int f = first + r * groups + group;
      rS[r] = {};
      if (f < F && column < V && group < groups) {
        rS[r] = load_state<kVec>(gS + f * a.kv_stride[2] + column);
      }
    }
  };
  load_rows(0, first_column);
  const float first_z = tid < F ? gZ[tid] : 0.0f;

  extern __shared__ float shared[];
  float* sPhiQ = shared;            // (F,)
  float* sQ = sPhiQ + F;            // (D,)
  float* sK = sQ + D;               // (n + 1, D)
  float* sW = sK + a.capacity * D;  // (n + 1,)
  float* sPhiK = sW + a.capacity;   // (F,) or (tokens, rows of a batch)
  float* sPart = sPhiK + decode_phi_rows(F, groups, kDeferred);  // (groups, columns kVec)
  const BlockSum denominator{sPart + groups * a.columns * kVec};

  const Element* gQ = static_cast<const Element*>(a.q) + b * a.q_stride[0] + h * a.q_stride[1];
  Tokens<Element> tokens{};
  tokens.k = static_cast<const Element*>(a.k) + b * a.k_stride[0] + h * a.k_stride[1];
  tokens.v = static_cast<const Element*>(a.v) + b * a.v_stride[0] + h * a.v_stride[1];
  tokens.pending = pending;
  if constexpr (kDeferred) {
    Element* gRingK = static_cast<Element*>(a.pending_k) + slot * a.pending_k_stride[0] +
                      h * a.pending_k_stride[2];
    Element* gRingV = static_cast<Element*>(a.pending_v) + slot * a.pending_v_stride[0] +
                      h * a.pending_v_stride[2];
    tokens.ring_k = gRingK, tokens.ring_v = gRingV;
    tokens.k_stride = a.pending_k_stride[1], tokens.v_stride = a.pending_v_stride[1];
    if (!fold) {
      Element* k = gRingK + pending * tokens.k_stride;
      Element* v = gRingV + pending * tokens.v_stride;
      for (int i = tid; i < D; i += blockDim.x) k[i] = tokens.k[i];
      for (int i = tid; i < V; i += blockDim.x) v[i] = tokens.v[i];
    }
  }
  const int count = tokens.count();
  for (int i = tid; i < (count + 1) * D; i += blockDim.x) {
    const int t = i / D - 1, j = i % D;
    sQ[i] = to_float(t < 0 ? gQ[j] : tokens.key(t)[j]);  // sK follows sQ
  }
  __syncthreads();

  float den = 0;
  for (int f = tid; f < F; f += blockDim.x) {
    const TaylorRow phi = taylor_row(f, D, a.root);
    const float phi_q = taylor_value(phi, sQ);
    float z = f == tid ? first_z : gZ[f];
    sPhiQ[f] = phi_q;
    if (fold) {
      for (int t = 0; t < count; ++t) {
        const float phi_k = taylor_value(phi, sK + t * D);
        if constexpr (!kDeferred) sPhiK[f] = phi_k;
        z += phi_k;
      }
      gZ[f] = z;
    }
    den += phi_q * z;
  }
  if (kDeferred && !fold) {
    for (int t = tid; t < count; t += blockDim.x) {
      float s = 0;
      for (int j = 0; j < D; ++j) s += sQ[j] * sK[t * D + j];
      s *= a.scale;
      const float w = 1.0f + s + 0.5f * s * s;
      sW[t] = w;
      den += w;
    }
  }
  denominator.add(den);
  __syncthreads();

  for (int tile = 0; tile < V; tile += a.columns * kVec) {
    const int column = tile + first_column;
    const bool active = column < V && group < groups;
    float sum[kVec] = {};
    const auto add_value = [&](int t, float weight, float* target) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) target[i] += weight * to_float(tokens.value(t)[column + i]);
    };
    for (int first = 0; first < F; first += kBatch * groups) {
      if (tile > 0 || first > 0) load_rows(first, column);
      if constexpr (!kDeferred) {
        float v[kVec] = {};
        if (active) add_value(0, 1.0f, v);
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          const int f = first + r * groups + group;
          const float phi_k = f < F ? sPhiK[f] : 0.0f;
#pragma unroll
          for (int i = 0; i < kVec; ++i) rS[r].x[i] += phi_k * v[i];
        }
      } else if (fold) {
        const int rows = kBatch * groups;
        for (int t0 = 0; t0 < count; t0 += kFoldTokens) {
          const int n = min(kFoldTokens, count - t0);
          __syncthreads();  // the last reads of sPhiK
          for (int r = tid; r < rows; r += blockDim.x) {
            const TaylorRow phi = taylor_row(first + r < F ? first + r : 0, D, a.root);
            for (int t = 0; t < n; ++t) sPhiK[t * rows + r] = taylor_value(phi, sK + (t0 + t) * D);
          }
          __syncthreads();
          for (int t = 0; t < n && active; ++t) {
            float v[kVec] = {};
            add_value(t0 + t, 1.0f, v);
#pragma unroll
            for (int r = 0; r < kBatch; ++r) {
              const float phi_k = sPhiK[t * rows + r * groups + group];
#pragma unroll
              for (int i = 0; i < kVec; ++i) rS[r].x[i] += phi_k * v[i];
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        const int f = first + r * groups + group;
        if (f >= F || !active) continue;
        const float phi_q = sPhiQ[f];
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += phi_q * rS[r].x[i];
        if (fold) store_state(gS + f * a.kv_stride[2] + column, rS[r]);
      }
    }
    if (kDeferred && !fold && active) {
      for (int t = group; t < count; t += groups) add_value(t, sW[t], sum);
    }

    const int width = a.columns * kVec;
    if (tile > 0) __syncthreads();  // the last reads of sPart
    if (group < groups) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sPart[group * width + first_column + i] = sum[i];
    }
    __syncthreads();
    const float factor = a.normalize ? 1.0f / denominator.total() : 1.0f;
    for (int i = tid; i < width && tile + i < V; i += blockDim.x) {
      float total = 0;
      for (int g = 0; g < groups; ++g) total += sPart[g * width + i];
      gOut[tile + i] = from_float<Element>(total * factor);
    }
  }
}

// S and z take in the tokens that wait in the ring. One block per (row, head), a thread per element
// of S; a conversion, not a step of decoding.
template <class Element>
__global__ void __launch_bounds__(kDecodeThreads)
    linear_attention_fold_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ float sK[];  // (n, D)
  const int64_t b = blockIdx.x / a.heads, h = blockIdx.x % a.heads;
  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  const int64_t fill = a.fill[b];
  if (row.kind != RowKind::kRun || fill < 0 || fill >= a.capacity) return;
  const int n = static_cast<int>(fill);
  const auto ring = [&](const void* data, const int64_t* stride) {
    return static_cast<const Element*>(data) + row.slot * stride[0] + h * stride[2];
  };
  const Element* gK = ring(a.pending_k, a.pending_k_stride);
  const Element* gV = ring(a.pending_v, a.pending_v_stride);
  for (int i = threadIdx.x; i < n * a.D; i += kDecodeThreads) {
    sK[i] = to_float(gK[i / a.D * a.pending_k_stride[1] + i % a.D]);
  }
  __syncthreads();
  // Column V of this loop is z, to which every token adds phi(k) times 1.
  float* gS = a.kv_state + row.slot * a.kv_stride[0] + h * a.kv_stride[1];
  float* gZ = a.k_state + row.slot * a.z_stride[0] + h * a.z_stride[1];
  for (int i = threadIdx.x; i < a.F * (a.V + 1); i += kDecodeThreads) {
    const int f = i / (a.V + 1), column = i % (a.V + 1);
    const TaylorRow phi = taylor_row(f, a.D, a.root);
    float& target = column == a.V ? gZ[f] : gS[f * a.kv_stride[2] + column];
    float sum = target;
    for (int t = 0; t < n; ++t) {
      const float v = column == a.V ? 1.0f : to_float(gV[t * a.pending_v_stride[1] + column]);
      sum += taylor_value(phi, sK + t * a.D) * v;
    }
    target = sum;
  }
}

}  // namespace based::cuda
