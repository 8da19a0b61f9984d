// What the serving warps of decode_block do.
#pragma once

#include "decode_block/stage.cuh"

namespace based::cuda {

// This CTA, whose threads have met, has finished a tile of stage s: the others may read it. The
// counter is 0 again after the last stage, which nobody waits for.
__device__ __forceinline__ void count_up(const BlockArgs& args, int s) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (s + 1 < args.stage_count) {
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(args.counter), "r"(args.last)
                 : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(args.counter), "r"(args.last)
                 : "memory");
  }
#endif
}

// Until the CTAs have finished so many tiles. This CTA still has to finish one.
__device__ __forceinline__ void wait_for_tiles(const BlockArgs& args, unsigned tiles) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (tiles == 0) return;
  while (true) {
    unsigned count;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(count)
                 : "l"(args.counter)
                 : "memory");
    if (count >= tiles) return;
    __nanosleep(20);  // who counts up has to get through too
  }
#endif
}

// Whether this is the first pass of a stage whose product is scaled: it has all rows of the others.
__device__ __forceinline__ bool needs_scales(const BlockStage& stage, const BlockWork& work) {
  return stage.squares != nullptr && work.in_first_pass();
}

// One thread. No stage holds it up, but the ring's room and what is on its way: with more of that,
// all that the stages wait for would queue behind it.
template <int kRows>
__device__ __forceinline__ void copy_weights(const BlockArgs& args, BlockShared<kRows>& shared) {
  using Shared = BlockShared<kRows>;
  RingPlace<Shared::kSlots> place, awaited;
  int turn = 0;
  for (int s = 0; s < args.stage_count; ++s) prefetch_tensor_map(args.stages[s].weight);
  for_each_tile(args, [&](int, const BlockStage& stage, const BlockWork& work) {
    for (int block = 0; block < work.count; ++block) {
      if (turn >= Shared::kSlots) shared.weights_empty[place.slot].wait(place.parity ^ 1);
      if (turn >= kBlockOnTheirWay) {
        shared.weights_full[awaited.slot].wait(awaited.parity);
        awaited.advance();
      }
      ++turn;
      const uint32_t to = shared_address(shared.weights) + place.slot * Shared::kWeightBytes;
      const int column = (work.first + block) * kBlockColumns;
      Mbarrier& full = shared.weights_full[place.slot];
      full.expect(Shared::kWeightBytes);
      if (stage.gated()) {
        copy_paired_box(to, stage.weight, work.tile * kBlockTile / 16, column, full, Keep::kShort);
      } else {
        copy_box(to, stage.weight, work.tile * kBlockTile, column, full, Keep::kShort);
      }
      place.advance();
    }
  });
}

// One thread.
template <int kRows>
__device__ __forceinline__ void copy_x(const BlockArgs& args, BlockShared<kRows>& shared) {
  using Shared = BlockShared<kRows>;
  RingPlace<Shared::kXSlots> place;
  int turn = 0, tiles = 0;
  for (int s = 0; s < args.stage_count; ++s) prefetch_tensor_map(args.stages[s].x);
  for_each_tile(args, [&](int, const BlockStage& stage, const BlockWork& work) {
    wait_for_tiles(args, stage.before);
    if (tiles > 0) shared.finished.wait((tiles - 1) % 2);
    ++tiles;
    if (needs_scales(stage, work)) shared.ready.arrive();
    // Other threads wrote x, and used its ring for sums: the copy engine comes after them.
    asm volatile("fence.proxy.async.global;\n fence.proxy.async.shared::cta;" ::: "memory");
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

// A warp asks for what the convolution keeps of the rows that this CTA finishes.
template <int kRows>
__device__ __forceinline__ void copy_states(const BlockArgs& args, BlockShared<kRows>& shared,
                                            const BlockStage& stage, const BlockWork& work,
                                            const BlockConvolution& conv) {
  const int channel = work.tile * kBlockTile / 2;
  const int bytes = min(kBlockTile / 2, stage.columns - channel) * (conv.taps - 1) *
                    static_cast<int>(sizeof(BlockElement));
  const int begin = work.begin() * 8 + threadIdx.x % 32, end = min(args.rows, work.end() * 8);
  uint32_t expected = 0;
  for (int row = begin; row < end; row += 32) {
    const DecodeRow place = decode_row(conv.indices, row, conv.slots);
    shared.slots[row] = place.kind == RowKind::kBad ? BlockShared<kRows>::kNone : place.slot;
    if (place.kind == RowKind::kRun) expected += bytes;
  }
  shared.states_full.expect(expected);
  fence_proxy_async();  // other threads used the place for sums
  for (int row = begin; row < end; row += 32) {
    const int64_t slot = shared.slots[row];
    if (slot < 0) continue;
    copy_bytes(shared_address(shared.state(work, row, conv.taps)),
               conv.state + slot * conv.state_stride + int64_t(channel) * (conv.taps - 1), bytes,
               shared_address(&shared.states_full));
  }
}

// A warp: 1 / root mean square of the rows that this CTA finishes; then it meets those who compute.
template <int kRows>
__device__ __forceinline__ void compute_scales(const BlockArgs& args, BlockShared<kRows>& shared) {
  constexpr int kAtOnce = 16;
  int parity = 0;
  for_each_tile(args, [&](int s, const BlockStage& stage, const BlockWork& work) {
    if (!needs_scales(stage, work)) return;
    shared.ready.wait(parity);
    parity ^= 1;
    if (stage.ending == BlockEnding::kConvolution)
      copy_states(args, shared, stage, work, args.convolutions[s / kBlockStages]);
    const int end = min(args.rows, work.end() * 8);
    for (int row = work.begin() * 8 + threadIdx.x % 32; row < end; row += 32) {
      float sum = 0.0f;
      for (int begin = 0; begin < stage.square_tiles; begin += kAtOnce) {
#pragma unroll
        for (int t = begin; t < begin + kAtOnce; ++t) {
          if (t < stage.square_tiles) sum += __ldcg(stage.squares + t * kDecodeBlockMaxRows + row);
        }
      }
      shared.scales[s / 2 % 2][row] = rsqrtf(sum / args.width + args.eps);
    }
    __syncwarp();
    asm volatile("barrier.arrive 1, 288;" ::: "memory");
  });
}

}  // namespace based::cuda
