// The columns of a CTA pass through a ring of shared-memory stages, block by block: X and Y (16,
// kV) each, that is k and v, or q and dout with lse and delta. The last warp of the CTA loads, the
// others compute, each at its own pace: a stage is `full` when its copies are done, and `empty`
// when every computing warp is done with it. A warp keeps what its next strip will see, so that a
// CTA reads every column once.
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

// Whether x holds in some thread of the CTA, asked where warps of different roles are:
// __syncthreads_or would have to be one and the same for all of them.
__device__ __forceinline__ bool any_in_block(bool x) {
  int any;
  asm volatile(
      "{.reg .pred x, any; setp.ne.b32 x, %1, 0;\n"
      "barrier.cta.red.or.pred any, 3, %2, x;\n"
      "selp.b32 %0, 1, 0, any;}\n"
      : "=r"(any)
      : "r"(int(x)), "r"(blockDim.x)
      : "memory");
  return any != 0;
}

// Element by element, one lane a row: this is rare.
template <class T>
__device__ __forceinline__ void cleanse(typename T::Element* sX, float* flags) {
  const int r = threadIdx.x % 32;
  if (r >= kBlock) return;
#pragma unroll 1
  for (int c = 0; c < T::kV; ++c) {
    typename T::Element& x = sX[r * T::kLd + c];
    if (fabsf(to_float(x)) <= FLT_MAX) continue;
    x = from_float<typename T::Element>(0.0f);
    flags[r] = __int_as_float(0x7fffffff);
  }
}

template <class Traits>
struct Columns {
  using T = typename Traits::Tile;
  using Element = typename T::Element;

  char* stages;
  int count;           // of the stages
  unsigned per_stage;  // 2^32 / count, rounded up

  __device__ __forceinline__ Element* x(int stage) const { return at(stage, 0); }
  __device__ __forceinline__ Element* y(int stage) const { return at(stage, Traits::kTileBytes); }
  __device__ __forceinline__ float* lse(int stage) const {
    return reinterpret_cast<float*>(at(stage, 2 * Traits::kTileBytes));
  }
  __device__ __forceinline__ float* delta(int stage) const { return lse(stage) + kBlock; }
  __device__ __forceinline__ float* flags(int stage) const {
    return reinterpret_cast<float*>(stages + count * Traits::kStageBytes) + stage * kBlock;
  }

  // By one thread, before a barrier of the CTA.
  __device__ __forceinline__ void init(int computing_warps) const {
    for (int i = 0; i < count; ++i) {
      full(i).init(32);
      empty(i).init(32 * computing_warps);
    }
  }

  // By the loading warp: load(i, stage) copies block i of `blocks`. `before` blocks have passed
  // already. kCheckX, kCheckY: the operands that are multiplied by weights.
  template <bool kCheckX, bool kCheckY, class LoadFn>
  __device__ __forceinline__ void produce(int before, int blocks, bool aligned, bool checked,
                                          const LoadFn& load) const {
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
      const int round = round_of(before + i), stage = before + i - round * count;
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
        if (threadIdx.x % 32 < kBlock) flags(stage)[threadIdx.x % 32] = 0.0f;
        if constexpr (kCheckX) cleanse<T>(x(stage), flags(stage));
        if constexpr (kCheckY) cleanse<T>(y(stage), flags(stage));
      }
      full(stage).arrive();
    }
  }

  // By a computing warp: the stage of block n, counted over all passes, once it is there.
  __device__ __forceinline__ int wait(int n) const {
    const int round = round_of(n), stage = n - round * count;
    full(stage).wait(round & 1);
    return stage;
  }

  // By every lane of a computing warp: it is done with the blocks before `end`, all of which it has
  // waited for, and has said so of those before `released`. One lane could speak for a warp after
  // __syncwarp(), but racecheck believes only those that arrive.
  __device__ __forceinline__ void release(int& released, int end) const {
    for (; released < end; ++released) empty(released - round_of(released) * count).arrive();
  }

  // The same for blocks that it has no use for. They have to be there all the same: a barrier must
  // not be a phase ahead.
  __device__ __forceinline__ void skip(int& released, int end) const {
    for (; released < end; ++released) empty(wait(released)).arrive();
  }

 private:
  // n / count, for n times count below 2^32.
  __device__ __forceinline__ int round_of(int n) const {
    return static_cast<int>(uint64_t(unsigned(n)) * per_stage >> 32);
  }
  __device__ __forceinline__ Element* at(int stage, int offset) const {
    return reinterpret_cast<Element*>(stages + stage * Traits::kStageBytes + offset);
  }
  __device__ __forceinline__ Mbarrier& full(int stage) const {
    return reinterpret_cast<Mbarrier*>(flags(count))[stage];
  }
  __device__ __forceinline__ Mbarrier& empty(int stage) const { return full(count + stage); }
};

// The stages lie behind the strips.
template <class Traits>
__device__ __forceinline__ Columns<Traits> columns_of(char* shared, const WindowLayout& l) {
  return {shared + (blockDim.x / 32 - 1) * Traits::kWarpBytes, l.stages, l.per_stage};
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
