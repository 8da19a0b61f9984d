// Linear attention, one token per row, plain and with deferred writes of the state.
//
// Memory-bound: the state (F, V) of a head is read once, and written once in the steps that fold.
// One block per (row, head). The state comes to shared memory in tiles of whole rows (one tile for
// D = 16, V = 64): by bulk copies on Hopper, by cp.async elsewhere and where rows are not
// contiguous. It is asked for first; while it is on its way, the block loads its tokens, all at
// once, and computes everything that is not S. The threads form `groups` rows of `columns` vectors;
// a thread keeps its columns and walks the rows f = group, group + groups, ... of a tile.
// Everything is fp32; out is rounded once.
#pragma once

#include "linear_attention_decode/state_tile.cuh"
#include "primitives/early_launch.cuh"
#include "primitives/element.cuh"
#include "primitives/taylor.cuh"
#include "primitives/vector.cuh"

namespace based::cuda {

// Sum over the block, known to every thread after the next barrier.
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

// A head's tokens that the state does not hold yet: the pending ones, oldest first, then this
// call's.
template <class Element>
struct Tokens {
  const Element *q, *k, *v;
  Element *ring_k, *ring_v;
  int64_t k_stride, v_stride;
  int pending;

  __device__ __forceinline__ Tokens(const DecodeArgs& a, int64_t b, int64_t h, int64_t slot,
                                    int pending)
      : q(of_call(a.q, a.q_stride, b, h)),
        k(of_call(a.k, a.k_stride, b, h)),
        v(of_call(a.v, a.v_stride, b, h)),
        ring_k(ring(a.pending_k, a.pending_k_stride, slot, h)),
        ring_v(ring(a.pending_v, a.pending_v_stride, slot, h)),
        k_stride(a.pending_k_stride[1]),
        v_stride(a.pending_v_stride[1]),
        pending(pending) {}

  static __device__ __forceinline__ const Element* of_call(const void* data, const int64_t* stride,
                                                           int64_t b, int64_t h) {
    return static_cast<const Element*>(data) + b * stride[0] + h * stride[1];
  }
  static __device__ __forceinline__ Element* ring(void* data, const int64_t* stride, int64_t slot,
                                                  int64_t h) {
    return static_cast<Element*>(data) + slot * stride[0] + h * stride[2];
  }
  __device__ __forceinline__ int count() const { return pending + 1; }
  __device__ __forceinline__ const Element* key(int t) const {
    return t < pending ? ring_k + t * k_stride : k;
  }
  __device__ __forceinline__ const Element* value(int t) const {
    return t < pending ? ring_v + t * v_stride : v;
  }
};

// Row f of phi of a token x whose element D is 1.
struct PhiRow {
  float coefficient;
  int i, j;

  __device__ __forceinline__ PhiRow(int f, int D, float root) {
    const TaylorRow row = taylor_row(f, D, root);
    coefficient = row.coefficient, i = row.i < 0 ? D : row.i, j = row.j < 0 ? D : row.j;
  }
  __device__ __forceinline__ float of(const float* x) const { return coefficient * x[i] * x[j]; }
};

template <class Element>
__device__ __forceinline__ void fill_row(Element* out, int V, float value) {
  for (int i = threadIdx.x; i < V; i += blockDim.x) out[i] = from_float<Element>(value);
}

// Starts to copy, or copies, kVec neighbouring elements of a token to shared memory.
template <int kVec, bool kAligned, class Element>
__device__ __forceinline__ void copy_elements(Element* shared, const Element* from) {
  constexpr int kBytes = kVec * sizeof(Element);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kAligned && kBytes == 16) {
    cp_async_16(to, from, true);
  } else if constexpr (kAligned && kBytes == 8) {
    cp_async_8(to, from);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) shared[i] = from[i];
  }
}

// Where things lie in shared memory, in floats from its begin. The tile is first, and the partial
// sums of out take its place.
struct DecodeShared {
  int token;  // floats from one token's q or k to the next one's: D, a 1 and padding
  int q, values, phi_k, phi_q, weights, denominator, barrier, end;

  __host__ __device__ __forceinline__ DecodeShared(const DecodeArgs& a, int element_bytes,
                                                   bool deferred) {
    const auto whole = [](int floats) { return (floats + 3) / 4 * 4; };
    token = whole(a.D + 1);
    q = whole((a.tile_rows > a.groups ? a.tile_rows : a.groups) * a.V);
    values = q + (a.capacity + 1) * token;
    phi_k = values + whole(a.capacity * a.V * element_bytes / 4 + 1);
    phi_q = phi_k + (deferred ? kDecodeFoldTokens * kDecodeFoldRows * a.groups : whole(a.F));
    weights = phi_q + a.F;
    denominator = weights + a.capacity;
    barrier = whole(denominator + kDecodeMaxThreads / 32);
    end = barrier + 2;
  }
};

// Plain (kDeferred = false):
//   S += phi(k)^T v,  z += phi(k),  out = phi(q) S / phi(q) z
// Deferred: n of the row's last tokens wait in its ring of C.
//   out = (phi(q) S + sum_t w_t v_t) / (phi(q) z + sum_t w_t), w = 1 + s + s^2/2, over these and
//   this call's token; with n + 1 < C k and v then go to place n of the ring, with n + 1 = C S and
//   z take in the C tokens.
template <class Element, int kVec, bool kAligned, bool kDeferred>
__global__ void __launch_bounds__(kDecodeMaxThreads, kDecodeMinBlocks)
    linear_attention_decode_kernel(const __grid_constant__ DecodeArgs a) {
  let_next_kernel_start();
  extern __shared__ __align__(128) float shared[];
  const DecodeShared at(a, sizeof(Element), kDeferred);
  auto* arrived = reinterpret_cast<CopyBarrier*>(shared + at.barrier);
  const int64_t b = blockIdx.x / unsigned(a.heads), h = blockIdx.x % unsigned(a.heads);
  const int tid = threadIdx.x, D = a.D, F = a.F, V = a.V, groups = a.groups;
  const int group = threadIdx.x / unsigned(a.columns);
  const int column = threadIdx.x % unsigned(a.columns) * kVec;
  Element* gOut = static_cast<Element*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1];
  if (tid == 0) {
    arrived->init();
    fence_barrier_init();
  }
  __syncwarp();  // orders init and copy for racecheck, which takes them for two lanes' accesses

  wait_for_earlier_kernels();
  IndexVector::Words waiting{};  // asked for together with the slot
  if constexpr (kDeferred) waiting = a.fill.load(b);
  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  if (row.kind != RowKind::kRun) return fill_row(gOut, V, filler(row.kind));
  float* gS = a.kv_state + row.slot * a.kv_stride[0] + h * a.kv_stride[1];
  const StateTile<kVec, kAligned, kDeferred> tile{a, gS, shared, arrived, group, column};
  tile.fetch(0);
  int pending = 0;
  if constexpr (kDeferred) {
    const int64_t n = a.fill.value(waiting);
    if (n < 0 || n >= a.capacity) {
      __syncthreads();
      tile.wait(0);  // no copy may come to shared memory that is another block's
      return fill_row(gOut, V, filler(RowKind::kBad));
    }
    pending = static_cast<int>(n);
  }

  float* sQ = shared + at.q;                                  // (D + 1,)
  float* sK = sQ + at.token;                                  // (n + 1, D + 1)
  auto* sV = reinterpret_cast<Element*>(shared + at.values);  // (n + 1, V)
  float* sW = shared + at.weights;                            // (n + 1,)
  float *sPhiQ = shared + at.phi_q, *sPhiK = shared + at.phi_k;
  const BlockSum denominator{shared + at.denominator};
  const bool active = tile.active();
  float* gZ = a.k_state + row.slot * a.z_stride[0] + h * a.z_stride[1];  // (F,)
  const float first_z = tid < F ? gZ[tid] : 0.0f;
  const Tokens<Element> tokens(a, b, h, row.slot, pending);
  const int count = tokens.count();
  const bool fold = kDeferred && count == a.capacity;
  for (int t = group; t < count && active; t += groups) {
    copy_elements<kVec, kAligned>(sV + t * V + column, tokens.value(t) + column);
  }
  cp_async_commit();
  // q and the keys: `key_step` elements a thread, so many tokens side by side.
  const int key_step = a.key_vectors ? 4 : 1;
  const int key_columns = D / key_step, key_rows = blockDim.x / unsigned(key_columns);
  const int key_row = threadIdx.x / unsigned(key_columns);
  const int key_column = threadIdx.x % unsigned(key_columns) * key_step;
  for (int t = key_row; t <= count && key_row < key_rows; t += key_rows) {
    const Element* from = (t == 0 ? tokens.q : tokens.key(t - 1)) + key_column;
    float* to = sQ + t * at.token + key_column;  // sK follows sQ
    if (key_step == 4) {
      const Vector<Element, 4> x = load_vector<4>(from);
      *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      *to = to_float(*from);
    }
  }
  for (int t = tid; t <= count; t += blockDim.x) sQ[t * at.token + D] = 1.0f;
  const PhiRow first_phi(tid, D, a.root);
  __syncthreads();

  float den = 0;
  for (int f = tid; f < F; f += blockDim.x) {
    const PhiRow phi = f == tid ? first_phi : PhiRow(f, D, a.root);
    const float phi_q = phi.of(sQ);
    float z = f == tid ? first_z : gZ[f];
    sPhiQ[f] = phi_q;
    if constexpr (!kDeferred) {
      const float phi_k = phi.of(sK);
      sPhiK[f] = phi_k;
      z += phi_k;
      gZ[f] = z;
    }
    den += phi_q * z;
    if (fold) {
      for (int t = 0; t < count; ++t) z += phi.of(sK + t * at.token);
      gZ[f] = z;
    }
  }
  if constexpr (kDeferred) {
    for (int t = tid; t < count; t += blockDim.x) {
      const float* k = sK + t * at.token;
      float s = 0;
      for (int j = 0; j < D; ++j) s += sQ[j] * k[j];
      s *= a.scale;
      const float w = 1.0f + s + 0.5f * s * s;
      sW[t] = w;
      den += w;
    }
  }
  denominator.add(den);
  cp_async_wait<0>();  // the values
  __syncthreads();

  float sum[kVec] = {};
  const auto value = [&](int t) {
    return *reinterpret_cast<const Vector<Element, kVec>*>(sV + t * V + column);
  };
  Vector<Element, kVec> new_v{};
  if (!kDeferred && active) new_v = value(0);
  for (int n = 0; n < a.tile_count; ++n) {
    const int rows = tile.rows(n), row0 = n * a.tile_rows;
    tile.wait(n);
    for (int r0 = group; r0 < rows && active; r0 += kDecodeRows * groups) {
      StateVector<kVec> s[kDecodeRows];
      float phi_q[kDecodeRows], phi_k[kDecodeRows];
#pragma unroll
      for (int u = 0; u < kDecodeRows; ++u) {
        const int r = r0 + u * groups;
        if (r < rows) s[u] = *tile.row(r), phi_q[u] = sPhiQ[row0 + r];
        if (!kDeferred && r < rows) phi_k[u] = sPhiK[row0 + r];
      }
#pragma unroll
      for (int u = 0; u < kDecodeRows; ++u) {
        const int r = r0 + u * groups;
        if (r >= rows) break;
        if constexpr (!kDeferred) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) s[u].x[i] += phi_k[u] * new_v[i];
          tile.store(n, r, s[u]);
        }
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += phi_q[u] * s[u].x[i];
      }
    }
    if (fold) {
      // S of kDecodeFoldRows neighbouring rows a thread is in registers while the tokens pass.
      const int chunk = kDecodeFoldRows * groups, lanes = blockDim.x / unsigned(chunk);
      const int lane = threadIdx.x / unsigned(chunk), lane_row = threadIdx.x % unsigned(chunk);
      __syncthreads();  // of a tile that came by cp.async a thread has seen its own elements only
      for (int r0 = 0; r0 < rows; r0 += chunk) {
        const int own = r0 + group * kDecodeFoldRows;
        const PhiRow phi_k(row0 + min(r0 + lane_row, rows - 1), D, a.root);
        StateVector<kVec> s[kDecodeFoldRows];
#pragma unroll
        for (int u = 0; u < kDecodeFoldRows; ++u) {
          if (active && own < rows) s[u] = *tile.row(min(own + u, rows - 1));
        }
        for (int t0 = 0; t0 < count; t0 += kDecodeFoldTokens) {
          __syncthreads();  // the last reads of sPhiK
          for (int t = lane; t < kDecodeFoldTokens && lane < lanes; t += lanes) {
            sPhiK[t * chunk + lane_row] =
                t0 + t < count ? phi_k.of(sK + (t0 + t) * at.token) : 0.0f;
          }
          __syncthreads();
          if (active && own < rows) {
#pragma unroll kDecodeFoldUnroll
            for (int t = 0; t < kDecodeFoldTokens; ++t) {
              const auto phi = *reinterpret_cast<const StateVector<kDecodeFoldRows>*>(
                  sPhiK + t * chunk + group * kDecodeFoldRows);
              const Vector<Element, kVec> v = value(min(t0 + t, count - 1));
#pragma unroll
              for (int u = 0; u < kDecodeFoldRows; ++u) {
#pragma unroll
                for (int i = 0; i < kVec; ++i) s[u].x[i] += phi.x[u] * v[i];
              }
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kDecodeFoldRows; ++u) {
          if (active && own + u < rows) tile.store(n, own + u, s[u]);
        }
      }
    }
    if (n + 1 < a.tile_count) {
      __syncthreads();  // the last reads of the tile
      tile.fetch(n + 1);
    }
  }
  if constexpr (kDeferred) {
    for (int t = group; t < count && active; t += groups) {
      const Vector<Element, kVec> v = value(t);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] += sW[t] * v[i];
    }
    if (!fold) {
      const int t = tokens.pending;
      Element* k = tokens.ring_k + t * tokens.k_stride;
      Element* v = tokens.ring_v + t * tokens.v_stride;
      for (int i = tid; i < D; i += blockDim.x) k[i] = from_float<Element>(sK[t * at.token + i]);
      for (int i = tid; i < V; i += blockDim.x) v[i] = sV[t * V + i];
    }
  }
  __syncthreads();  // the last reads of the tile
  if (group < groups) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) shared[group * V + column + i] = sum[i];
  }
  __syncthreads();
  const float factor = a.normalize ? 1.0f / denominator.total() : 1.0f;
  for (int i = tid; i < V; i += blockDim.x) {
    float total = 0;
#pragma unroll 4
    for (int g = 0; g < groups; ++g) total += shared[g * V + i];
    gOut[i] = from_float<Element>(total * factor);
  }
}

}  // namespace based::cuda
