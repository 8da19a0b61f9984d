// The running sums over tokens: S^T = sum_t y_t phi(x_t)^T (64 columns of y, kF), y = v or the
// gradient u, in fp32 registers; and z = sum_t w_t phi(x_t), w = 1 or delta, from the moments
// sum w x x^T, sum w x and sum w.
#pragma once

#include "linear_attention/features.cuh"

namespace based::cuda::linear {

// Coefficient of phi(q)_f phi(k)_f; phi's own is its root.
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

// 0 or 1: whose rows of a chunk, and whose half of the features, a warpgroup has. By a shuffle,
// which tells the compiler that it is the same throughout a warp.
__device__ __forceinline__ int warpgroup_index() {
  return __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
}

// The accumulator element acc[4 i + e] of a warpgroup is row acc_row(e), column 8 i +
// acc_column(e).
__device__ __forceinline__ int acc_row(int e) {
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
}
__device__ __forceinline__ int acc_column(int e) { return threadIdx.x % 4 * 2 + e % 2; }

// The part of S^T (64, kF) that a warpgroup holds, as an accumulator of mma.cuh: one half of the
// features of two warpgroups' (kSlices 2), or all.
template <class Tr, int kSlices = 2>
struct StateSlice {
  static constexpr int kWidth = Tr::kF / kSlices, kSliceGroups = kWidth / 8;
  float sum[kWidth / 2];

  __device__ __forceinline__ static int slice() { return kSlices == 1 ? 0 : warpgroup_index(); }
  __device__ __forceinline__ static int first_group() { return slice() * kSliceGroups; }
  __device__ __forceinline__ static int feature(int i, int e) {
    const int first = kSlices == 1 ? 0 : int(threadIdx.x) / 128 * kSliceGroups;
    return 8 * (first + i) + acc_column(e);
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] = 0;
  }

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] *= factor;
  }

  __device__ __forceinline__ void load(const float* workspace) {
    const float* at = workspace + slice() * (kWidth / 2 * 128) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) sum[i] = at[i * 128];
  }
  __device__ __forceinline__ void store(float* workspace) const {
    float* at = workspace + slice() * (kWidth / 2 * 128) + threadIdx.x % 128;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) at[i * 128] = sum[i];
  }

  // += or = a public state; it carries one factor of phi's coefficient, the sums carry none.
  // Rows at and above `valid` are columns of v that do not exist.
  __device__ __forceinline__ void add_public(const State& state, int64_t sequence, int head,
                                             int first_v, int valid, float scale) {
    const float* base = state.kv + sequence * state.kv_sequence + head * state.kv_head + first_v;
#pragma unroll
    for (int i = 0; i < kSliceGroups; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = feature(i, e), v = acc_row(e);
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
    for (int i = 0; i < kSliceGroups; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int f = feature(i, e), v = acc_row(e);
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
    const int group = first_group();
    char* first = sState.at(acc_row(0), group) + threadIdx.x % 4 * 4;
    const float product = scale * scale * unit;
    static_for<0, kSliceGroups>([&](auto i) {
      constexpr int kLow = decltype(i)::value,
                    kHigh = kLow + kSliceGroups;  // of either warpgroup
      float c = product;
      if (8 * kLow < 2 * Tr::D || kHigh == Tr::kConstant / 8) {
        c = feature_coefficient<Tr>(feature(kLow, 0), scale) * unit;
      }
      const float* s = sum + 4 * kLow;
      char* at = first + kLow * StateTile::kColStride;
      *reinterpret_cast<uint32_t*>(at) = pack<typename Tr::Element>(s[0] * c, s[1] * c);
      *reinterpret_cast<uint32_t*>(at + 8 * 16) = pack<typename Tr::Element>(s[2] * c, s[3] * c);
    });
  }

  // += the sum over the tokens of sPhi of y phi(x)^T; their y are the rows of sY (., 64+) from
  // `first` on.
  template <class YTile, class PhiTile>
  __device__ __forceinline__ void update(const YTile& sY, const PhiTile& sPhi, int first) {
    constexpr int N = Tr::D == 32 ? kWidth / 2 : kWidth;  // features of one product
    const int group = first_group();
#pragma unroll
    for (int k = 0; k < PhiTile::kRows; k += 16) {
#pragma unroll
      for (int part = 0; part < kWidth / N; ++part) {
        mma_AtB<typename Tr::Element, N>(reinterpret_cast<float (&)[N / 2]>(sum[part * (N / 2)]),
                                         sY, first + k, 0, sPhi, k, group + part * (N / 8));
      }
    }
  }
};

// sZ (kF) = (the workspace's z, if any, plus a public k_state, if given) times unit.
template <class Tr>
__device__ __forceinline__ void load_k_state(float* sZ, const float* workspace, const State& state,
                                             int64_t sequence, int head, float scale, float unit) {
  for (int f = threadIdx.x; f < Tr::kF; f += kThreads) {
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

// z = sum_t w_t phi(x_t), 64 features a product: phi^T times the 8 columns that follow those of y,
// w in the first (and what its rounding left in the second). The products are dealt to both
// warpgroups.
template <class Tr>
struct FeatureSums {
  static constexpr int kTiles = (Tr::kF + 63) / 64, kPerGroup = (kTiles + 1) / 2;
  float sum[kPerGroup][4] = {};

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < 4 * kPerGroup; ++i) sum[i / 4][i % 4] *= factor;
  }

  // As StateSlice::update; features past kF are sums of whatever lies behind sPhi, and never used.
  template <class YTile, class PhiTile>
  __device__ __forceinline__ void update(const YTile& sY, const PhiTile& sPhi, int first) {
    const int group = warpgroup_index();
#pragma unroll
    for (int i = 0; i < kPerGroup; ++i) {
      const int tile = group * kPerGroup + i;
      if (kTiles % 2 != 0 && i + 1 == kPerGroup && tile >= kTiles) continue;
#pragma unroll
      for (int k = 0; k < Tr::kPhiTokens; k += 16) {
        mma_AtB<typename Tr::Element, 8>(sum[i], sPhi, k, 8 * tile, sY, first + k, kTileV / 8);
      }
    }
  }

  // fn(feature, value) for every feature, each from one lane.
  template <class Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) const {
    if (threadIdx.x % 4 != 0) return;
    const int group = threadIdx.x / 128;
#pragma unroll
    for (int i = 0; i < kPerGroup; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int f = 64 * (group * kPerGroup + i) + acc_row(2 * half);
        if (f <= Tr::kConstant) fn(f, sum[i][2 * half] + sum[i][2 * half + 1]);
      }
    }
  }
};

}  // namespace based::cuda::linear
