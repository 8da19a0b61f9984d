// The columns of a CTA pass through a ring of shared-memory stages, tile by tile: X and Y (kColumns,
// kV) each, that is k and v, or q and dout with lse and delta.
//
// A masked pair has weight 0, but 0 times a NaN of a row of X or Y that is multiplied by weights
// would still reach rows that do not see it. So every thread looks at what it has copied. A tile
// that is not finite is cleansed: such elements become 0 and their column is flagged with NaN,
// which the kernels add to its scores before they mask. The rows that see the column become NaN.
#pragma once

#include "sliding_window/tiles.cuh"
#include "sliding_window/traits.h"

namespace based::cuda {

template <class Element>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using type = __half2;
};

// Whether what this thread has copied of a tile is finite: x * 0 is 0.
template <class T>
__device__ __forceinline__ bool copied_finite(const typename T::Element* sX, int rows) {
  if constexpr (std::is_same_v<typename T::Element, float>) {
    float sum = 0.0f;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * T::kChunks; i += blockDim.x) {
      const float4 x = *reinterpret_cast<const float4*>(sX + i / T::kChunks * T::kLd +
                                                        i % T::kChunks * T::kChunk);
      sum = fmaf(x.x, 0.0f, fmaf(x.y, 0.0f, fmaf(x.z, 0.0f, fmaf(x.w, 0.0f, sum))));
    }
    return sum == 0.0f;
  } else {
    using Pair = typename PairOf<typename T::Element>::type;
    const typename T::Element zero = from_float<typename T::Element>(0.0f);
    const Pair zeros = {zero, zero};
    Pair sum = zeros;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * T::kChunks; i += blockDim.x) {
      const uint4 x = *reinterpret_cast<const uint4*>(sX + i / T::kChunks * T::kLd +
                                                      i % T::kChunks * T::kChunk);
      const Pair* pairs = reinterpret_cast<const Pair*>(&x);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum = __hfma2(pairs[j], zeros, sum);
    }
    return to_float(sum.x) == 0.0f && to_float(sum.y) == 0.0f;
  }
}

// Element by element, one thread a row: this is rare.
template <class T>
__device__ __noinline__ void cleanse(typename T::Element* sX, float* flags, int rows) {
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    for (int c = 0; c < T::kV; ++c) {
      typename T::Element& x = sX[r * T::kLd + c];
      if (fabsf(to_float(x)) <= FLT_MAX) continue;
      x = from_float<typename T::Element>(0.0f);
      flags[r] = __int_as_float(0x7fffffff);
    }
  }
}

template <class Traits>
struct Columns {
  using T = typename Traits::Tile;
  using Element = typename T::Element;

  char* stages;
  float* flags;

  __device__ __forceinline__ Element* x(int tile) const { return at(tile, 0); }
  __device__ __forceinline__ Element* y(int tile) const { return at(tile, Traits::kTileBytes); }
  __device__ __forceinline__ float* lse(int tile) const {
    return reinterpret_cast<float*>(at(tile, 2 * Traits::kTileBytes));
  }
  __device__ __forceinline__ float* delta(int tile) const { return lse(tile) + Traits::kColumns; }

  // load(i) starts the copies of tile i; body(i, flags) uses it, where flags is null for a tile that
  // is finite. kCheckX, kCheckY: the operands that are multiplied by weights.
  template <bool kCheckX, bool kCheckY, class LoadFn, class BodyFn>
  __device__ __forceinline__ void for_each(int tiles, const LoadFn& load, const BodyFn& body) const {
    constexpr int kAhead = Traits::kStages - 1;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < tiles) load(i);
      cp_async_commit();
    }
    for (int i = 0; i < tiles; ++i) {
      cp_async_wait<kAhead - 1>();
      const bool finite = (!kCheckX || copied_finite<T>(x(i), Traits::kColumns)) &&
                          (!kCheckY || copied_finite<T>(y(i), Traits::kColumns));
      const bool dirty = __syncthreads_or(!finite);
      if (i + kAhead < tiles) load(i + kAhead);
      cp_async_commit();
      if (dirty) {
        for (int r = threadIdx.x; r < Traits::kColumns; r += blockDim.x) flags[r] = 0.0f;
        if constexpr (kCheckX) cleanse<T>(x(i), flags, Traits::kColumns);
        if constexpr (kCheckY) cleanse<T>(y(i), flags, Traits::kColumns);
        __syncthreads();
      }
      body(i, dirty ? flags : nullptr);
    }
    cp_async_wait<0>();
  }

 private:
  __device__ __forceinline__ Element* at(int tile, int offset) const {
    return reinterpret_cast<Element*>(stages + tile % Traits::kStages * Traits::kStageBytes +
                                      offset);
  }
};

// The stages lie behind the row tiles.
template <class Traits>
__device__ __forceinline__ Columns<Traits> columns_of(char* shared) {
  char* const stages = shared + Traits::kRowTiles * (blockDim.x / 32) * Traits::kWarpBytes;
  return {stages, reinterpret_cast<float*>(stages + Traits::kStages * Traits::kStageBytes)};
}

}  // namespace based::cuda
