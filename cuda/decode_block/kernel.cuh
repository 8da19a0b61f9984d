// The kernel of decode_block; stage.cuh says how it works.
#pragma once

#include "decode_block/copies.cuh"
#include "decode_block/finish.cuh"
#include "primitives/wgmma.cuh"

namespace based::cuda {

// A warp's rows of a block of weights as left operands of wgmma, one for each 16 columns.
__device__ __forceinline__ void load_weights(uint32_t (&operands)[kBlockColumns / 16][4],
                                             uint32_t block) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 16, half = threadIdx.x % 32 / 16;
#pragma unroll
  for (int k = 0; k < kBlockColumns / 16; ++k) {
    ldmatrix_x4<false>(operands[k], block + row * 128 + ((2 * k + half) ^ row % 8) * 16);
  }
}

// sums (64, kRows) of a warpgroup. While the stage before is not finished, the threads' registers
// hold what the ring has no room for.
template <int kRows>
__device__ __forceinline__ void multiply(float (&sums)[kRows / 2], BlockShared<kRows>& shared,
                                         int count, RingPlace<BlockShared<kRows>::kSlots>& weights,
                                         RingPlace<BlockShared<kRows>::kXSlots>& x) {
  using Shared = BlockShared<kRows>;
  constexpr int kHeld = Shared::kHeld, kSteps = kBlockColumns / 16;
  const bool first_lane = threadIdx.x % 32 == 0;
  const auto weights_at = [&](int slot) {
    return shared_address(shared.weights) + slot * Shared::kWeightBytes;
  };
  const auto x_at = [&](int slot) {
    return wgmma_swizzled_descriptor(shared_address(shared.x) + slot * Shared::kXBytes);
  };
  uint32_t held[kHeld][kSteps][4];
#pragma unroll
  for (int block = 0; block < kHeld; ++block) {
    if (block >= count) break;
    shared.weights_full[weights.slot].wait(weights.parity);
    load_weights(held[block], weights_at(weights.slot));
    __syncwarp();
    if (first_lane) shared.weights_empty[weights.slot].arrive();
    weights.advance();
  }
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  pin(sums);
  int last_x = -1, last_weights = -1;  // to be released
  // When the products before this block's are done.
  const auto release = [&] {
    if (last_x >= 0 && first_lane) shared.x_empty[last_x].arrive();
    if (last_weights >= 0 && first_lane) shared.weights_empty[last_weights].arrive();
    last_x = x.slot, last_weights = -1;
  };
#pragma unroll
  for (int block = 0; block < kHeld; ++block) {
    if (block >= count) break;
    shared.x_full[x.slot].wait(x.parity);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma_rs<BlockElement, kRows, false>(sums, held[block][k], x_at(x.slot) + 2 * k, true);
    }
    wgmma_commit();
    wgmma_wait<1>();
    release();
    x.advance();
  }
  for (int block = kHeld; block < count; ++block) {
    shared.weights_full[weights.slot].wait(weights.parity);
    shared.x_full[x.slot].wait(x.parity);
    const uint64_t a = wgmma_swizzled_descriptor(weights_at(weights.slot) +
                                                 threadIdx.x / 128 * (Shared::kWeightBytes / 2));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      wgmma_ss_nt<BlockElement>(sums, a + 2 * k, x_at(x.slot) + 2 * k, true);  // 32 bytes
    }
    wgmma_commit();
    wgmma_wait<1>();
    release();
    last_weights = weights.slot;
    weights.advance(), x.advance();
  }
  wgmma_wait<0>();
  pin(sums);
  release();
}

template <auto kValue>
using Constant = std::integral_constant<decltype(kValue), kValue>;

template <int kRows>
__device__ __forceinline__ void compute(const BlockArgs& args, BlockShared<kRows>& shared) {
  using Shared = BlockShared<kRows>;
  RingPlace<Shared::kSlots> weights;
  RingPlace<Shared::kXSlots> x;
  int parity = 0, states_parity = 0;
  for_each_tile(args, [&](int s, const BlockStage& stage, const BlockWork& work) {
    if (threadIdx.x == 0 && work.splits > 1) {
      for (int batch = 0; batch < Shared::kBatches; ++batch) {
        const int groups = work.in_batch(work.part, batch);
        shared.sums_full[batch].expect((work.splits - 1) * groups * Shared::kGroupBytes);
      }
    }
    const BlockConvolution& conv = args.convolutions[s / kBlockStages];
    const BlockConstants constants(stage, work, conv);
    {
      float sums[kRows / 2];
      multiply(sums, shared, work.count, weights, x);
      give_sums(sums, shared, work);
    }
    const auto finish = [&](auto splits) {
      const auto finish_by = [&](auto ending, auto kept) {
        finish_tile<decltype(splits)::value, decltype(ending)::value, decltype(kept)::value>(
            shared, args, stage, work, conv, constants, shared.scales[s / 2 % 2], parity,
            states_parity);
      };
      constexpr Constant<BlockEnding::kConvolution> convolution;
      const int kept = conv.taps - 1;
      switch (stage.ending) {
        case BlockEnding::kLinear:
          return finish_by(Constant<BlockEnding::kLinear>{}, Constant<0>{});
        case BlockEnding::kSwiglu:
          return finish_by(Constant<BlockEnding::kSwiglu>{}, Constant<0>{});
        case BlockEnding::kConvolution:
          if (kept == 1) finish_by(convolution, Constant<1>{});
          if (kept == 2) finish_by(convolution, Constant<2>{});
          if (kept == 3) finish_by(convolution, Constant<3>{});
      }
    };
    if (work.splits == 8) finish(Constant<8>{});
    if (work.splits == 4) finish(Constant<4>{});
    if (work.splits == 2) finish(Constant<2>{});
    if (work.splits == 1) finish(Constant<1>{});
    if (work.splits > 1) parity ^= 1;
    if (stage.ending == BlockEnding::kConvolution) states_parity ^= 1;
    shared.finished.arrive();  // all threads
    if (threadIdx.x == 0) count_up(args, s);
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
    cluster_arrive_relaxed();  // its barriers are there
    if (warp < kBlockComputing / 32) {
      cluster_wait();
      wait_for_earlier_kernels();
      compute(args, shared);
    } else {
      if (warp == kBlockWeights / 32) {  // reads nothing that a kernel before writes
        if (threadIdx.x == kBlockWeights) copy_weights(args, shared);
        __syncwarp();
        cluster_wait();
      } else {
        cluster_wait();
        wait_for_earlier_kernels();
        if (threadIdx.x == kBlockX) copy_x(args, shared);
        if (warp == kBlockScales / 32) compute_scales(args, shared);
        __syncwarp();
      }
    }
    __syncthreads();
    cluster_arrive_relaxed();  // all sums that were sent from here have arrived
    cluster_wait();
  }
}

}  // namespace based::cuda
