// The kernel of decode_block; stage.cuh says how it works.
#pragma once

#include "decode_block/copies.cuh"
#include "decode_block/finish.cuh"
#include "primitives/wgmma.cuh"

namespace based::cuda {

// sums (64, kRows) of a warpgroup.
template <int kRows>
__device__ __forceinline__ void multiply(float (&sums)[kRows / 2], BlockShared<kRows>& shared,
                                         int count, RingPlace<BlockShared<kRows>::kSlots>& weights,
                                         RingPlace<BlockShared<kRows>::kXSlots>& x) {
  using Shared = BlockShared<kRows>;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  pin(sums);
  int last_weights = 0, last_x = 0;
  const auto release = [&] {
    if (threadIdx.x % 32 != 0) return;
    shared.weights_empty[last_weights].arrive();
    shared.x_empty[last_x].arrive();
  };
  for (int block = 0; block < count; ++block) {
    shared.weights_full[weights.slot].wait(weights.parity);
    shared.x_full[x.slot].wait(x.parity);
    const uint64_t a = wgmma_swizzled_descriptor(shared_address(shared.weights) +
                                                 weights.slot * Shared::kWeightBytes +
                                                 threadIdx.x / 128 * (Shared::kWeightBytes / 2));
    const uint64_t b =
        wgmma_swizzled_descriptor(shared_address(shared.x) + x.slot * Shared::kXBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockColumns / 16; ++k) {
      wgmma_ss_nt<BlockElement>(sums, a + 2 * k, b + 2 * k, true);  // 32 bytes
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (block > 0) release();
    last_weights = weights.slot, last_x = x.slot;
    weights.advance(), x.advance();
  }
  wgmma_wait<0>();
  pin(sums);
  release();
}

template <int kRows>
__device__ __forceinline__ void compute(const BlockArgs& args, BlockShared<kRows>& shared) {
  using Shared = BlockShared<kRows>;
  RingPlace<Shared::kSlots> weights;
  RingPlace<Shared::kXSlots> x;
  int parity = 0;
  for_each_tile(args, [&](int s, const BlockStage& stage, const BlockWork& work) {
    if (threadIdx.x == 0) {
      shared.sums_full.expect((stage.splits - 1) * (work.end - work.begin) * Shared::kGroupBytes);
    }
    {
      float sums[kRows / 2];
      multiply(sums, shared, work.count, weights, x);
      send_sums(sums, shared, stage, work);
    }
    const auto finish = [&](auto splits) {
      constexpr int kSplits = decltype(splits)::value;
      stage.swiglu ? finish_tile<kSplits, true>(shared, args, stage, work, parity)
                   : finish_tile<kSplits, false>(shared, args, stage, work, parity);
    };
    if (stage.splits == 8) finish(std::integral_constant<int, 8>{});
    if (stage.splits == 4) finish(std::integral_constant<int, 4>{});
    if (stage.splits == 2) finish(std::integral_constant<int, 2>{});
    if (stage.splits == 1) finish(std::integral_constant<int, 1>{});
    parity ^= 1;
    if (threadIdx.x == 0) count_up(args.counters + s);
  });
}

template <int kRows>
__global__ void __launch_bounds__(kBlockThreads, 1)
    decode_block_kernel(const __grid_constant__ BlockArgs args) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<BlockShared<kRows>*>(memory);
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    let_next_kernel_start();
    if (threadIdx.x == 0) shared.init();
    __syncthreads();
    cluster_arrive_relaxed();          // its barriers are there
    if (warp == kBlockWeights / 32) {  // reads nothing that a kernel before writes
      if (threadIdx.x == kBlockWeights) copy_weights(args, shared);
      __syncwarp();
      cluster_wait();
    } else {
      cluster_wait();
      wait_for_earlier_kernels();
      if (warp == kBlockX / 32) {
        if (threadIdx.x == kBlockX) copy_x(args, shared);
        __syncwarp();
      } else if (warp == kBlockScales / 32) {
        compute_scales(args, shared);
      } else {
        compute(args, shared);
      }
    }
    __syncthreads();
    // The last CTA leaves the counters as they were.
    if (threadIdx.x == 0 &&
        atomicAdd(args.counters + kDecodeBlockCounters - 1, 1) + 1 == gridDim.x) {
      for (int i = 0; i < kDecodeBlockCounters; ++i) args.counters[i] = 0;
    }
  }
}

}  // namespace based::cuda
