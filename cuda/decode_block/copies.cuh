// What the serving warps of decode_block do.
#pragma once

#include "decode_block/stage.cuh"

namespace based::cuda {

// A tile of a stage was finished by this CTA, whose threads have met: others may read it.
__device__ __forceinline__ void count_up(unsigned* counter) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
#endif
}

// Until all CTAs have finished stage s.
__device__ __forceinline__ void wait_for_stage(const BlockArgs& args, int s) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const unsigned all = args.stages[s].tiles * args.stages[s].splits;
  unsigned count = 0;
  while (count < all) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(count)
                 : "l"(args.counters + s)
                 : "memory");
  }
  // What they wrote, the copy engine may read.
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
}

// One thread: nothing but the ring's room holds it up.
template <int kRows>
__device__ __forceinline__ void copy_weights(const BlockArgs& args, BlockShared<kRows>& shared) {
  using Shared = BlockShared<kRows>;
  RingPlace<Shared::kSlots> place;
  int turn = 0;
  for_each_tile(args, [&](int, const BlockStage& stage, const BlockWork& work) {
    const int half = kBlockTile / 2;
    const int upper = work.tile * (stage.swiglu ? half : kBlockTile);
    const int lower = upper + (stage.swiglu ? stage.columns : half);
    for (int block = 0; block < work.count; ++block) {
      if (turn >= Shared::kSlots) shared.weights_empty[place.slot].wait(place.parity ^ 1);
      ++turn;
      const uint32_t to = shared_address(shared.weights) + place.slot * Shared::kWeightBytes;
      const int column = (work.first + block) * kBlockColumns;
      Mbarrier& full = shared.weights_full[place.slot];
      full.expect(Shared::kWeightBytes);
      copy_box(to, stage.weight, upper, column, full, Keep::kShort);
      copy_box(to + Shared::kWeightBytes / 2, stage.weight, lower, column, full, Keep::kShort);
      place.advance();
    }
  });
}

// One thread.
template <int kRows>
__device__ __forceinline__ void copy_x(const BlockArgs& args, BlockShared<kRows>& shared) {
  using Shared = BlockShared<kRows>;
  RingPlace<Shared::kXSlots> place;
  int turn = 0, tiles = 0, ready = 0;
  for_each_tile(args, [&](int s, const BlockStage& stage, const BlockWork& work) {
    if (tiles > 0) {  // the sums of the tile before were read
      wait_for_cluster(shared.sums_empty, (tiles - 1) % 2);
      fence_proxy_async();
    }
    ++tiles;
    for (; ready < s; ++ready) wait_for_stage(args, ready);
    for (int block = 0; block < work.count; ++block) {
      if (turn >= Shared::kXSlots) shared.x_empty[place.slot].wait(place.parity ^ 1);
      ++turn;
      shared.x_full[place.slot].expect(Shared::kXBytes);
      copy_box(shared_address(shared.x) + place.slot * Shared::kXBytes, stage.x, 0,
               (work.first + block) * kBlockColumns, shared.x_full[place.slot], Keep::kLong);
      place.advance();
    }
  });
}

// A warp: 1 / root mean square of the rows that this CTA finishes. Then it meets those who compute.
template <int kRows>
__device__ __forceinline__ void compute_scales(const BlockArgs& args, BlockShared<kRows>& shared,
                                               int width) {
  int tiles = 0, ready = 0;
  for_each_tile(args, [&](int s, const BlockStage& stage, const BlockWork& work) {
    if (tiles > 0) wait_for_cluster(shared.sums_empty, (tiles - 1) % 2);
    ++tiles;
    if (stage.squares != nullptr) {
      for (; ready < s; ++ready) wait_for_stage(args, ready);
      const int share = (args.rows + stage.splits - 1) / stage.splits;
      const int end = min(args.rows, (work.part + 1) * share);
      for (int row = work.part * share + threadIdx.x % 32; row < end; row += 32) {
        float sum = 0.0f;
#pragma unroll 4
        for (int t = 0; t < stage.square_tiles; ++t) {
          sum += __ldcg(stage.squares + t * kDecodeBlockMaxRows + row);
        }
        shared.scales[row] = rsqrtf(sum / width + args.eps);
      }
    }
    __syncwarp();
    asm volatile("barrier.arrive 1, 288;" ::: "memory");
  });
}

}  // namespace based::cuda
