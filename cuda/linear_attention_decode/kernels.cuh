// Linear attention, one token per row, plain and with deferred writes of the state.
//
// Memory-bound: the state (F, V) of a head is read once, and written once in the steps that fold.
// One block per (row, head). The state comes to shared memory in tiles of whole rows (one tile for
// D = 16, V = 64): by bulk copies on Hopper, by cp.async elsewhere and where rows are not
// contiguous. The threads form `groups` rows of `columns` vectors; a thread keeps its columns,
// walks the rows f = group, group + groups, ... of a tile and writes them back from registers.
// Everything is fp32; out is rounded once.
#pragma once

#include "linear_attention_decode/tuning.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cp_async.cuh"
#include "primitives/decode_row.cuh"
#include "primitives/early_launch.cuh"
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
  int64_t slots;
  int heads, D, F, V, capacity;
  int columns, groups, tile_rows, tile_count;  // of a block
  float root, scale;                           // sqrt(scale), scale
  bool normalize;
  bool aligned, contiguous;  // rows of S: whole 16-byte vectors, without gaps
};

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

// kVec neighbouring elements of a row of S.
template <int kVec>
struct alignas(4 * kVec) StateVector {
  float x[kVec];
};

template <int kVec>
__device__ __forceinline__ void store_state(float* target, const StateVector<kVec>& v,
                                            bool aligned) {
  if (aligned) {
    *reinterpret_cast<StateVector<kVec>*>(target) = v;
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) target[i] = v.x[i];
  }
}

// The tiles of one head's S on their way through shared memory.
template <int kVec>
struct StateTiles {
  const DecodeArgs& a;
  float* gS;             // (F, V)
  float* sS;             // (kDecodeStages, tile_rows, V)
  CopyBarrier* arrived;  // one for every stage
  int group, column;     // of this thread

  __device__ __forceinline__ int count() const { return a.tile_count; }
  __device__ __forceinline__ int rows(int tile) const {
    return min(a.tile_rows, a.F - tile * a.tile_rows);
  }
  __device__ __forceinline__ float* shared(int tile) const {
    return sS + tile % kDecodeStages * a.tile_rows * a.V;
  }
  __device__ __forceinline__ float* global(int tile) const {
    return gS + int64_t(tile) * a.tile_rows * a.kv_stride[2];
  }
  __device__ __forceinline__ bool bulk() const { return kHasBulkCopy && a.aligned && a.contiguous; }
  __device__ __forceinline__ bool active() const { return group < a.groups && column < a.V; }

  // Called by every thread for every tile in order; past the last one nothing is fetched.
  __device__ __forceinline__ void fetch(int tile) const {
    if (bulk()) {
      if (threadIdx.x == 0 && tile < count()) {
        arrived[tile % kDecodeStages].copy(shared(tile), global(tile), rows(tile) * a.V * 4);
      }
      return;
    }
    if (tile < count() && active()) {
      for (int r = group; r < rows(tile); r += a.groups) {
        const float* source = global(tile) + r * a.kv_stride[2] + column;
        const auto target =
            static_cast<uint32_t>(__cvta_generic_to_shared(shared(tile) + r * a.V + column));
        if (kVec == 4 && a.aligned) {
          cp_async_16(target, source, true);
        } else {
#pragma unroll
          for (int i = 0; i < kVec; ++i) cp_async_4(target + 4 * i, source + i);
        }
      }
    }
    cp_async_commit();
  }

  // Until this thread's elements of a tile are there: the fetch of the next one may be under way.
  __device__ __forceinline__ void wait(int tile) const {
    if (bulk()) {
      arrived[tile % kDecodeStages].wait(tile / kDecodeStages % 2);
    } else {
      cp_async_wait<kDecodeStages - 1>();
    }
  }
};

// Floats of shared memory besides the tiles: q and the row's keys, phi(q), phi of keys, weights,
// the denominator's parts. The partial sums of out take the place of the tiles.
__host__ __device__ constexpr int decode_phi_k_floats(int F, int tile_rows, bool deferred) {
  return deferred ? tile_rows * kDecodeFoldTokens : F;
}
__host__ __device__ constexpr int decode_tile_floats(int V, int tile_rows, int columns, int vec,
                                                     int groups) {
  const int tiles = kDecodeStages * tile_rows * V, sums = groups * columns * vec;
  return ((tiles > sums ? tiles : sums) + 3) / 4 * 4;
}
__host__ __device__ constexpr int decode_shared_floats(int D, int F, int V, int capacity,
                                                       int tile_rows, int columns, int vec,
                                                       int groups, bool deferred) {
  return decode_tile_floats(V, tile_rows, columns, vec, groups) +
         decode_phi_k_floats(F, tile_rows, deferred) + F + D + capacity * (D + 1) +
         kDecodeThreads / 32;
}

// phi of a row of a tile, for the tokens of a pass.
struct alignas(4 * kDecodeFoldTokens) FoldPhi {
  float x[kDecodeFoldTokens];
};

// Plain (kDeferred = false):
//   S += phi(k)^T v,  z += phi(k),  out = phi(q) S / phi(q) z
// Deferred: n of the row's last tokens wait in its ring of C.
//   n + 1 < C:  out = (phi(q) S + sum_t w_t v_t) / (phi(q) z + sum_t w_t), w = 1 + s + s^2/2, over
//               the n + 1 waiting tokens; k and v go to place n of the ring, S and z stay.
//   n + 1 = C:  S and z take in the C tokens and are written; then as in the plain form.
template <class Element, int kVec, bool kDeferred>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocksPerSM)
    linear_attention_decode_kernel(const __grid_constant__ DecodeArgs a) {
  let_next_kernel_start();
  const int64_t b = blockIdx.x / unsigned(a.heads), h = blockIdx.x % unsigned(a.heads);
  const int tid = threadIdx.x, D = a.D, F = a.F, V = a.V, groups = a.groups;
  const int group = threadIdx.x / unsigned(a.columns);
  const int column = threadIdx.x % unsigned(a.columns) * kVec;
  Element* gOut = static_cast<Element*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1];
  const TaylorRow first_phi = taylor_row(tid, D, a.root);
  const int first_token = threadIdx.x / unsigned(D), first_feature = threadIdx.x % unsigned(D);

  wait_for_earlier_kernels();
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

  extern __shared__ __align__(128) float shared[];
  __shared__ CopyBarrier arrived[kDecodeStages];
  float* sPart = shared;  // (groups, columns kVec), after the last tile
  float* sPhiK = shared + decode_tile_floats(V, a.tile_rows, a.columns, kVec, groups);
  float* sPhiQ = sPhiK + decode_phi_k_floats(F, a.tile_rows, kDeferred);  // (F,)
  float* sQ = sPhiQ + F;                                                  // (D,)
  float* sK = sQ + D;                                                     // (n + 1, D)
  float* sW = sK + a.capacity * D;                                        // (n + 1,)
  const BlockSum denominator{sW + a.capacity};

  // The state is on its way before anything else is needed.
  const StateTiles<kVec> tiles{
      a, a.kv_state + slot * a.kv_stride[0] + h * a.kv_stride[1], shared, arrived, group, column};
  if (tid == 0 && tiles.bulk()) {
    for (CopyBarrier& barrier : arrived) barrier.init();
    fence_barrier_init();
  }
  __syncwarp();  // orders init and copy for racecheck, which takes them for two lanes' accesses
  for (int tile = 0; tile < kDecodeStages; ++tile) tiles.fetch(tile);
  float* gZ = a.k_state + slot * a.z_stride[0] + h * a.z_stride[1];  // (F,)
  const float first_z = tid < F ? gZ[tid] : 0.0f;

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
  const bool active = tiles.active();
  // This thread's columns of the values of a token; its first one of those it will add.
  const auto load_value = [&](int t, float* v) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = to_float(tokens.value(t)[column + i]);
  };
  const int first_value = kDeferred && !fold ? group : 0;
  float first_v[kVec] = {};
  if (active && first_value < count) load_value(first_value, first_v);
  for (int i = tid; i < (count + 1) * D; i += blockDim.x) {
    const int t = (i == tid ? first_token : unsigned(i) / unsigned(D)) - 1;
    const int j = i == tid ? first_feature : unsigned(i) % unsigned(D);
    sQ[i] = to_float(t < 0 ? gQ[j] : tokens.key(t)[j]);  // sK follows sQ
  }
  __syncthreads();

  float den = 0;
  for (int f = tid; f < F; f += blockDim.x) {
    const TaylorRow phi = f == tid ? first_phi : taylor_row(f, D, a.root);
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

  float sum[kVec] = {};
  for (int tile = 0; tile < tiles.count(); ++tile) {
    const int rows = tiles.rows(tile);
    float* sTile = tiles.shared(tile) + column;
    float* gTile = tiles.global(tile) + column;
    const float* sTilePhiQ = sPhiQ + tile * a.tile_rows;
    tiles.wait(tile);
    if constexpr (kDeferred) {
      if (fold) {
        for (int t0 = 0; t0 < count; t0 += kDecodeFoldTokens) {
          float v[kDecodeFoldTokens][kVec];
#pragma unroll
          for (int t = 0; t < kDecodeFoldTokens; ++t) {
            if (active) load_value(min(t0 + t, count - 1), v[t]);
          }
          __syncthreads();  // the last reads of sPhiK
          for (int r = tid; r < rows; r += blockDim.x) {
            const TaylorRow phi = taylor_row(tile * a.tile_rows + r, D, a.root);
            FoldPhi row_phi;
#pragma unroll
            for (int t = 0; t < kDecodeFoldTokens; ++t) {
              row_phi.x[t] = t0 + t < count ? taylor_value(phi, sK + (t0 + t) * D) : 0.0f;
            }
            reinterpret_cast<FoldPhi*>(sPhiK)[r] = row_phi;
          }
          __syncthreads();
          for (int r = group; r < rows && active; r += groups) {
            auto& s = *reinterpret_cast<StateVector<kVec>*>(sTile + r * V);
            const FoldPhi phi_k = reinterpret_cast<const FoldPhi*>(sPhiK)[r];
            StateVector<kVec> x = s;
#pragma unroll
            for (int t = 0; t < kDecodeFoldTokens; ++t) {
#pragma unroll
              for (int i = 0; i < kVec; ++i) x.x[i] += phi_k.x[t] * v[t][i];
            }
            s = x;
          }
        }
      }
    }
    if (active) {
#pragma unroll 4
      for (int r = group; r < rows; r += groups) {
        StateVector<kVec> s = *reinterpret_cast<const StateVector<kVec>*>(sTile + r * V);
        const float phi_q = sTilePhiQ[r];
        if constexpr (!kDeferred) {
          const float phi_k = sPhiK[tile * a.tile_rows + r];
#pragma unroll
          for (int i = 0; i < kVec; ++i) s.x[i] += phi_k * first_v[i];
        }
        if (fold) store_state(gTile + r * a.kv_stride[2], s, a.aligned);
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += phi_q * s.x[i];
      }
    }
    if (tiles.count() > kDecodeStages) {
      fence_proxy_async();  // what the fold wrote comes before what the next copy writes
      __syncthreads();      // the last reads of this stage
      tiles.fetch(tile + kDecodeStages);
    } else if (!tiles.bulk()) {
      cp_async_commit();
    }
  }
  if (kDeferred && !fold && active) {
    for (int t = group; t < count; t += groups) {
      if (t > group) load_value(t, first_v);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += sW[t] * first_v[i];
    }
  }

  const int width = a.columns * kVec;
  __syncthreads();  // the last reads of the tiles
  if (group < groups) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) sPart[group * width + column + i] = sum[i];
  }
  __syncthreads();
  const float factor = a.normalize ? 1.0f / denominator.total() : 1.0f;
  for (int i = tid; i < V; i += blockDim.x) {
    float total = 0;
    for (int g = 0; g < groups; ++g) total += sPart[g * width + i];
    gOut[i] = from_float<Element>(total * factor);
  }
}

}  // namespace based::cuda
