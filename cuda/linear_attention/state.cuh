// The running sums over tokens: S^T = sum_t y_t phi(x_t)^T (64 columns of y, kF), y = v or the
// gradient u, in fp32 registers; and z = sum_t w_t phi(x_t), w = 1 or delta, from the moments
// sum w x x^T, sum w x and sum w.
#pragma once

#include "linear_attention/features.cuh"

namespace based::cuda::linear {

// Coefficient of phi(q)_f phi(k)_f for the lane's two features of a group; phi's own is its root.
template <class Tr>
__device__ __forceinline__ float group_coefficient(int g, float scale) {
  const int first = 8 * g;
  const bool constant = g == Tr::kConstant / 8 && int(threadIdx.x % 4) * 2 == Tr::kConstant % 8;
  if (constant) return 1.0f;
  return first < Tr::D ? scale : first < 2 * Tr::D ? 0.5f * scale * scale : scale * scale;
}

template <class Tr>
__device__ __forceinline__ float feature_coefficient(int f, float scale) {
  if (f == Tr::kConstant) return 1.0f;
  return f < Tr::D ? scale : f < 2 * Tr::D ? 0.5f * scale * scale : scale * scale;
}

// Row of a public state for feature f: the constant comes first there.
template <class Tr>
__device__ __forceinline__ int public_row(int f) {
  return f == Tr::kConstant ? 0 : f + 1;
}

// The slice of a thread's warpgroup, by a shuffle that tells the compiler it is the same in a warp.
template <class Tr>
__device__ __forceinline__ int warpgroup_index() {
  return Tr::kSlices == 1 ? 0 : __shfl_sync(0xffffffffu, int(threadIdx.x) / kWarpgroup, 0);
}

// The (64, kSliceF) part of S^T that a warpgroup holds, as an accumulator of mma.cuh.
template <class Tr>
struct StateSlice {
  float sum[Tr::kSliceF / 2];

  __device__ __forceinline__ static int slice() { return warpgroup_index<Tr>(); }
  __device__ __forceinline__ static int row(int e) {  // of sum[4 i + e]
    return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
  }
  __device__ __forceinline__ static int feature(int i, int e) {
    return slice() * Tr::kSliceF + 8 * i + threadIdx.x % 4 * 2 + e % 2;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tr::kSliceF / 2; ++i) sum[i] = 0;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < Tr::kSliceF / 2; ++i) sum[i] *= factor;
  }

  __device__ __forceinline__ void load(const float* workspace) {
#pragma unroll
    for (int i = 0; i < Tr::kSliceF / 2; ++i) sum[i] = workspace[i * Tr::kThreads + threadIdx.x];
  }
  __device__ __forceinline__ void store(float* workspace) const {
#pragma unroll
    for (int i = 0; i < Tr::kSliceF / 2; ++i) workspace[i * Tr::kThreads + threadIdx.x] = sum[i];
  }

  // += or = a public state; it carries one factor of phi's coefficient, the sums carry none.
  // Rows at and above `valid` are columns of v that do not exist.
  __device__ __forceinline__ void add_public(const State& state, int64_t sequence, int head,
                                             int first_v, int valid, float scale) {
    const float* base = state.kv + sequence * state.kv_sequence + head * state.kv_head + first_v;
#pragma unroll
    for (int i = 0; i < Tr::kSliceGroups; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = feature(i, e), v = row(e);
        if (f > Tr::kConstant || v >= valid) continue;
        sum[4 * i + e] +=
            base[public_row<Tr>(f) * state.kv_row + v] * rsqrtf(feature_coefficient<Tr>(f, scale));
      }
    }
  }
  __device__ __forceinline__ void store_public(const State& state, int64_t sequence, int head,
                                               int first_v, int valid, float scale,
                                               float unit) const {
    float* base = state.kv + sequence * state.kv_sequence + head * state.kv_head + first_v;
#pragma unroll
    for (int i = 0; i < Tr::kSliceGroups; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = feature(i, e), v = row(e);
        if (f > Tr::kConstant || v >= valid) continue;
        base[public_row<Tr>(f) * state.kv_row + v] =
            sum[4 * i + e] * unit * sqrtf(feature_coefficient<Tr>(f, scale));
      }
    }
  }

  // Rows 0 ... 63 of sState (rows of v, kF) = the slice times the coefficients times `unit`,
  // rounded.
  template <class StateTile>
  __device__ __forceinline__ void publish(StateTile& sState, float scale, float unit) const {
    char* first = sState.at(row(0), slice() * Tr::kSliceGroups) + threadIdx.x % 4 * 4;
#pragma unroll
    for (int i = 0; i < Tr::kSliceGroups; ++i) {
      const float c = group_coefficient<Tr>(slice() * Tr::kSliceGroups + i, scale) * unit;
      const float* s = sum + 4 * i;
      char* at = first + i * StateTile::kColStride;
      *reinterpret_cast<uint32_t*>(at) = pack<typename Tr::Element>(s[0] * c, s[1] * c);
      *reinterpret_cast<uint32_t*>(at + 8 * 16) = pack<typename Tr::Element>(s[2] * c, s[3] * c);
    }
  }

  // += sum over the chunk of y phi(x)^T: the product of the tiles sY (64, 64+) and sPhi (64, kF).
  template <class YTile, class PhiTile>
  __device__ __forceinline__ void update(const YTile& sY, const PhiTile& sPhi) {
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      mma_AtB<typename Tr::Element, Tr::kSliceF>(sum, sY, sPhi, k, slice() * Tr::kSliceGroups);
    }
  }
};

// sZ (kF) = (the workspace's z, if any, plus a public k_state, if given) times unit.
template <class Tr>
__device__ __forceinline__ void load_k_state(float* sZ, const float* workspace, const State& state,
                                             int64_t sequence, int head, float scale, float unit) {
  for (int f = threadIdx.x; f < Tr::kF; f += Tr::kThreads) {
    float z = 0;
    if (f <= Tr::kConstant) {
      if (workspace != nullptr) z = workspace[f];
      if (state.kv != nullptr) {
        z += state.k[sequence * state.k_sequence + head * state.k_head + public_row<Tr>(f)] *
             rsqrtf(feature_coefficient<Tr>(f, scale));
      }
    }
    sZ[f] = z * unit;
  }
}

// z from its moments. A warp holds one 16 x 8 tile of sum w x x^T, or of sum w x (the last column
// of tiles); warps beyond the tiles hold nothing. sum w is the caller's.
template <class Tr>
struct Moments {
  using Element = typename Tr::Element;
  static constexpr int kRowTiles = (Tr::D + 15) / 16, kColumns = Tr::D / 8 + 1;
  static_assert(kRowTiles * kColumns <= Tr::kThreads / 32);
  float sum[4] = {};

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (float& value : sum) value *= factor;
  }

  // += the chunk's. kWeighted: w are 64 floats in shared memory, else w = 1.
  template <bool kWeighted, class XTile>
  __device__ __forceinline__ void update(const XTile& sX, const float* w) {
    const int warp = threadIdx.x / 32, rows = warp % kRowTiles, column = warp / kRowTiles;
    if (column >= kColumns) return;
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    const bool linear = column == kColumns - 1;
#pragma unroll
    for (int k = 0; k < kChunk; k += 16) {
      uint32_t a[4], b[4];
      load_a_transposed(a, sX, k, 2 * rows);
      if (!linear) load_b(b, sX, k, column / 2 * 2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t& value = b[i];
        if (!linear && column % 2 == 1) value = b[i + 2];
        float2 weight = {1.0f, 1.0f};
        if constexpr (kWeighted) {
          weight = *reinterpret_cast<const float2*>(w + k + 2 * c + 8 * i);
          if (!linear) {
            const float2 x = unpack<Element>(value);
            value = pack<Element>(x.x * weight.x, x.y * weight.y);
          }
        }
        if (linear) {  // columns: w rounded, and what the rounding left
          const uint32_t high = pack<Element>(weight.x, weight.y);
          const float2 rounded = unpack<Element>(high);
          const uint32_t low = pack<Element>(weight.x - rounded.x, weight.y - rounded.y);
          value = g == 0 ? high : g == 1 ? low : 0;
        }
      }
      warp_mma<Element>(sum, a, b[0], b[1]);
    }
  }

  // fn(feature, value) for every feature but the constant, each from one lane.
  template <class Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) const {
    constexpr int D = Tr::D;
    const int warp = threadIdx.x / 32, rows = warp % kRowTiles, column = warp / kRowTiles;
    if (column >= kColumns) return;
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = 16 * rows + g + e / 2 * 8, j = 8 * column + 2 * c + e % 2;
      if (i >= D) continue;
      if (column == kColumns - 1) {
        if (c == 0 && e % 2 == 0) fn(i, sum[e] + sum[e + 1]);
        continue;
      }
      const int rotation = j >= i ? j - i : j - i + D;
      if (2 * rotation < D || (2 * rotation == D && 2 * i < D)) fn((1 + rotation) * D + i, sum[e]);
    }
  }
};

}  // namespace based::cuda::linear
