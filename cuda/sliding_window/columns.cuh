// The columns of a CTA pass through a ring of shared-memory stages, tile by tile: X and Y
// (kColumns, kV) each, that is k and v, or q and dout with lse and delta. The last warp of the CTA
// loads, the others compute, each at its own pace: a stage is `full` when its copies are done, and
// `empty` when every computing warp is done with it.
//
// A masked pair has weight 0, but 0 times a NaN of a row that is multiplied by weights would still
// reach rows that do not see it. So a CTA whose sums are not finite starts again, checked: the
// loading warp then cleanses its tiles. An element that is not finite becomes 0 and its column is
// flagged with NaN, which the kernels add to its scores before they mask; the rows that see the
// column become NaN, and all others what they would have been.
#pragma once

#include "primitives/mbarrier.cuh"
#include "sliding_window/tiles.cuh"
#include "sliding_window/traits.h"

namespace based::cuda {

// Element by element, one lane a row: this is rare.
template <class T>
__device__ __forceinline__ void cleanse(typename T::Element* sX, float* flags, int rows) {
#pragma unroll 1
  for (int r = threadIdx.x % 32; r < rows; r += 32) {
#pragma unroll 1
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

  __device__ __forceinline__ Element* x(int stage) const { return at(stage, 0); }
  __device__ __forceinline__ Element* y(int stage) const { return at(stage, Traits::kTileBytes); }
  __device__ __forceinline__ float* lse(int stage) const {
    return reinterpret_cast<float*>(at(stage, 2 * Traits::kTileBytes));
  }
  __device__ __forceinline__ float* delta(int stage) const { return lse(stage) + Traits::kColumns; }

  // By one thread, before a barrier of the CTA.
  __device__ __forceinline__ void init(int computing_warps) const {
    for (int i = 0; i < Traits::kStages; ++i) {
      full(i).init(32);
      empty(i).init(computing_warps);
    }
  }

  // By the loading warp: load(i, stage) copies tile i. `before` tiles have passed already. kCheckX,
  // kCheckY: the operands that are multiplied by weights.
  template <bool kCheckX, bool kCheckY, class LoadFn>
  __device__ __forceinline__ void produce(int before, int tiles, bool aligned, bool checked,
                                          const LoadFn& load) const {
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int n = before + i, stage = n % Traits::kStages, round = n / Traits::kStages;
      if (round > 0) empty(stage).wait((round - 1) & 1);
      load(i, stage);
      if (aligned && !checked) {
        full(stage).arrive_after_copies();
        continue;
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncwarp();
      if (checked) {
        for (int r = threadIdx.x % 32; r < Traits::kColumns; r += 32) flags(stage)[r] = 0.0f;
        if constexpr (kCheckX) cleanse<T>(x(stage), flags(stage), Traits::kColumns);
        if constexpr (kCheckY) cleanse<T>(y(stage), flags(stage), Traits::kColumns);
      }
      full(stage).arrive();
    }
  }

  // By every computing warp: body(i, stage, flags), flags null unless checked.
  template <class BodyFn>
  __device__ __forceinline__ void consume(int before, int tiles, bool checked,
                                          const BodyFn& body) const {
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      const int n = before + i, stage = n % Traits::kStages;
      full(stage).wait(n / Traits::kStages & 1);
      body(i, stage, checked ? flags(stage) : nullptr);
      __syncwarp();
      if (threadIdx.x % 32 == 0) empty(stage).arrive();
    }
  }

 private:
  __device__ __forceinline__ Element* at(int stage, int offset) const {
    return reinterpret_cast<Element*>(stages + stage * Traits::kStageBytes + offset);
  }
  __device__ __forceinline__ float* flags(int stage) const {
    return reinterpret_cast<float*>(stages + Traits::kStages * Traits::kStageBytes) +
           stage * Traits::kColumns;
  }
  __device__ __forceinline__ Mbarrier& full(int stage) const {
    return reinterpret_cast<Mbarrier*>(flags(Traits::kStages))[stage];
  }
  __device__ __forceinline__ Mbarrier& empty(int stage) const {
    return full(Traits::kStages + stage);
  }
};

// The stages lie behind the row tiles.
template <class Traits>
__device__ __forceinline__ Columns<Traits> columns_of(char* shared) {
  return {shared + Traits::kRowTiles * (blockDim.x / 32 - 1) * Traits::kWarpBytes};
}

template <int N>
__device__ __forceinline__ bool all_finite(const float (&x)[N][4]) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < N; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(x[j][i], 0.0f, sum);
  }
  return sum == 0.0f;
}

}  // namespace based::cuda
