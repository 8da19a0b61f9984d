// What follows a product of decode_block: sums of the spans of K, then bias, SwiGLU, residual or
// convolution.
//
// Of eight rows of x a thread has two, and of the tile two rows, eight apart, as wgmma leaves them:
// (x row, tile row), (x row + 1, tile row), (x row, tile row + 8), (x row + 1, tile row + 8). It
// trades two with a neighbour, and then has (tile row, tile row + 1) and (tile row + 8, tile row +
// 9) of one x row: two pairs of neighbouring columns of out; or, where there are gates, one of
// values and one of their gates.
#pragma once

#include "decode_block/copies.cuh"
#include "primitives/sigmoid.cuh"

namespace based::cuda {

__device__ __forceinline__ void meet_computing() {
  asm volatile("barrier.sync 2, 256;" ::: "memory");
}

// Gives the sums to those who add them up.
template <int kRows>
__device__ __forceinline__ void give_sums(const float (&sums)[kRows / 2],
                                          BlockShared<kRows>& shared, const BlockWork& work) {
  meet_computing();  // x was read
#pragma unroll
  for (int group = 0; group < kRows / 8; ++group) {
    if (group >= work.groups()) break;
    *shared.own_sums(group) = {sums[4 * group], sums[4 * group + 1], sums[4 * group + 2],
                               sums[4 * group + 3]};
  }
  fence_proxy_async();
  meet_computing();
  // A batch for each warp: of eight spans one each, of two up to four.
  using Shared = BlockShared<kRows>;
  const int other = threadIdx.x / 32 % work.splits, batch = threadIdx.x / 32 / work.splits;
  const int count = work.in_batch(other, batch), first = batch * kBlockBatch;
  if (threadIdx.x % 32 == 0 && other != work.part && count > 0) {
    const int begin = work.begin(other), all = work.begin(other + 1) - begin;
    copy_to_rank(shared_address(shared.sums) + (work.part * all + first) * Shared::kGroupBytes,
                 shared_address(shared.x) + (begin + first) * Shared::kGroupBytes,
                 count * Shared::kGroupBytes, shared.sums_full[batch], work.leader() + other);
  }
}

// sums of a group as wgmma leaves them become two pairs.
__device__ __forceinline__ void make_pairs(float (&y)[4]) {
  const bool odd = threadIdx.x % 8 >= 4;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float got = __shfl_xor_sync(~0u, odd ? y[i] : y[i + 1], 4);
    (odd ? y[i] : y[i + 1]) = got;
  }
}

// Where a thread's pairs lie.
struct BlockPlace {
  bool gated;
  int column, in_group;  // the first one's column of out, and the row among eight

  __device__ __forceinline__ BlockPlace(const BlockWork& work, bool gated) : gated(gated) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    column = (work.tile * 8 + warp) * (gated ? 8 : 16) + lane / 8 * 2;
    in_group = lane % 4 * 2 + lane / 4 % 2;
  }
  // Of the pair behind the first, in the product.
  __device__ __forceinline__ int second(const BlockStage& stage) const {
    return column + (gated ? stage.columns : 8);
  }
};

// What a thread multiplies with and adds, in place before the product is done: it may come from
// memory.
struct BlockConstants {
  using Pair = Vector<BlockElement, 2>;
  Pair bias[2];  // of the pairs
  // Of the pairs the norm's weights, or of a pair of channels the taps of the convolution; what a
  // shorter one lacks at the front is 0.
  Pair factors[kDecodeBlockMaxTaps];

  __device__ __forceinline__ BlockConstants(const BlockStage& stage, const BlockWork& work,
                                            const BlockConvolution& conv) {
    const BlockPlace place(work, stage.gated());
    const int columns = (place.gated ? 2 : 1) * stage.columns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = i == 0 ? place.column : place.second(stage);
      const bool low = column < columns, high = column + 1 < columns;
      bias[i] = load(stage.bias + column, 1, low && stage.bias, high && stage.bias);
      factors[i] = load(stage.norm + column, 1, low && stage.norm, high && stage.norm);
    }
    if (stage.ending != BlockEnding::kConvolution) return;
#pragma unroll
    for (int i = 0; i < kDecodeBlockMaxTaps; ++i) {
      const int tap = i - (kDecodeBlockMaxTaps - conv.taps);
      const bool there = tap >= 0 && place.column < stage.columns;
      factors[i] = load(conv.weight + place.column * conv.weight_stride + tap, conv.weight_stride,
                        there, there);
    }
  }
  // Two elements that lie `apart`; 0 for one that is not there.
  static __device__ __forceinline__ Pair load(const BlockElement* from, int64_t apart, bool low,
                                              bool high) {
    const auto* const bits = reinterpret_cast<const uint16_t*>(from);
    Pair pair{};
    if (low) pair.words[0] = bits[0];
    if (high) pair.words[0] |= uint32_t(bits[apart]) << 16;
    return pair;
  }
};

// What a convolution keeps of a pair of channels: kKept values of one, then those of the other.
template <int kKept>
struct alignas(kKept == 2 ? 8 : 4) BlockKept {
  uint16_t bits[2][kKept];  // of bfloat16

  // silu of the convolution of the newest inputs, which take their place here.
  __device__ __forceinline__ float convolve(int channel, const BlockConstants& constants,
                                            float newest) {
    constexpr int kMissing = kDecodeBlockMaxTaps - 1 - kKept;
    uint16_t (&inputs)[kKept] = bits[channel];
    float sum = constants.factors[kDecodeBlockMaxTaps - 1][channel] * newest;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float input = __uint_as_float(uint32_t(inputs[i]) << 16);
      sum += constants.factors[kMissing + i][channel] * input;
      inputs[i] =
          i + 1 < kKept ? inputs[i + 1] : __bfloat16_as_ushort(from_float<BlockElement>(newest));
    }
    return sum * sigmoid(sum);
  }
};

// out <- this CTA's rows of a tile. kKept: of a convolution.
template <int kSplits, BlockEnding kEnding, int kKept, int kRows>
__device__ __forceinline__ void finish_tile(BlockShared<kRows>& shared, const BlockArgs& args,
                                            const BlockStage& stage, const BlockWork& work,
                                            const BlockConvolution& conv,
                                            const BlockConstants& constants,
                                            const float (&scales)[kRows], int parity,
                                            int states_parity) {
  using Shared = BlockShared<kRows>;
  constexpr int kBatch = kBlockBatch;  // an odd last group is done twice
  constexpr bool kGated = kEnding != BlockEnding::kLinear;
  constexpr int kPairs = kGated ? 1 : 2;  // of out
  const BlockPlace place(work, kGated);
  const bool scaled = stage.squares != nullptr, adds = !kGated && stage.norm != nullptr;
  const int begin = work.begin(), count = work.end() - begin;
  // Of every warp and row.
  float* const warp_squares = reinterpret_cast<float*>(shared.own_place(work));
  const float4* sums[kSplits];  // of the spans
#pragma unroll
  for (int part = 0; part < kSplits; ++part) {
    sums[part] = part == work.part ? shared.own_sums(begin) : shared.others_sums(part * count);
  }
  float2 residual[kBatch][2] = {};
  const auto load_residual = [&](int first) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int row = (begin + min(first + b, count - 1)) * 8 + place.in_group;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const int column = place.column + 8 * pair;
        if (row >= args.rows || column >= stage.columns) continue;
        const float* const from = stage.residual + row * stage.residual_stride + column;
        residual[b][pair] = stage.residual_pairs ? __ldcg(reinterpret_cast<const float2*>(from))
                                                 : float2{__ldcg(from), __ldcg(from + 1)};
      }
    }
  };
  if (adds && count > 0) load_residual(0);
  // With those who computed the scales.
  if (needs_scales(stage, work)) asm volatile("barrier.sync 1, 288;" ::: "memory");
  if (kKept > 0) shared.states_full.wait(states_parity);
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    if (adds && first > 0) load_residual(first);
    if (kSplits > 1) shared.sums_full[first / kBatch].wait(parity);
    // What is none of out is computed too, and not stored: 0 in columns, anything in rows.
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int in_share = min(first + b, count - 1);
      const int row = (begin + in_share) * 8 + place.in_group;
      float y[4] = {};
#pragma unroll
      for (int part = 0; part < kSplits; ++part) {
        const float4 x = sums[part][in_share * kBlockComputing];
        y[0] += x.x, y[1] += x.y, y[2] += x.z, y[3] += x.w;
      }
      make_pairs(y);
      const float scale = scaled ? scales[row] : 1.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = y[i] * scale + constants.bias[i / 2][i % 2];
      if constexpr (kEnding == BlockEnding::kSwiglu) {
        y[0] *= y[2] * sigmoid(y[2]), y[1] *= y[3] * sigmoid(y[3]);
      }
      if constexpr (kKept > 0) {
        const int64_t slot = shared.slots[row];
        const int channel = place.column - work.tile * (kBlockTile / 2);
        using Kept = BlockKept<kKept>;
        Kept kept =
            *reinterpret_cast<const Kept*>(shared.state(work, row, kKept + 1) + channel * kKept);
        y[0] = kept.convolve(0, constants, y[0]) * y[2];
        y[1] = kept.convolve(1, constants, y[1]) * y[3];
        if (slot < 0) y[0] = y[1] = filler(slot == -1 ? RowKind::kSkip : RowKind::kBad);
        if (slot >= 0 && row < args.rows && place.column < stage.columns) {
          *reinterpret_cast<Kept*>(conv.state + slot * conv.state_stride +
                                   int64_t(place.column) * kKept) = kept;
        }
      }
      if (adds) {
        float squares = 0.0f;
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          y[2 * pair] += residual[b][pair].x, y[2 * pair + 1] += residual[b][pair].y;
        }
#pragma unroll
        for (float value : y) squares += value * value;
#pragma unroll
        for (int mask = 8; mask < 32; mask *= 2) {  // of the warp's 16 columns
          squares += __shfl_xor_sync(~0u, squares, mask);
        }
        if (threadIdx.x % 32 < 8) {
          warp_squares[(threadIdx.x / 32 * count + in_share) * 8 + place.in_group] = squares;
        }
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int column = place.column + 8 * pair;
        if (row >= args.rows || column >= stage.columns) continue;
        float low = y[2 * pair], high = y[2 * pair + 1];
        if (adds) {
          *reinterpret_cast<float2*>(stage.residual_out + int64_t(row) * stage.columns + column) = {
              low, high};
          low *= constants.factors[pair][0], high *= constants.factors[pair][1];
        }
        BlockElement* const out = stage.out + row * stage.out_stride + column;
        if (stage.out_pairs) {
          *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(low, high);
        } else {
          out[0] = from_float<BlockElement>(low);
          if (column + 1 < stage.columns) out[1] = from_float<BlockElement>(high);
        }
      }
    }
  }
  meet_computing();
  if (adds) {
    const int row = static_cast<int>(threadIdx.x);
    if (row < count * 8) {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < 8; ++warp) sum += warp_squares[warp * 8 * count + row];
      stage.squares_out[work.tile * kDecodeBlockMaxRows + begin * 8 + row] = sum;
    }
    meet_computing();
  }
}

}  // namespace based::cuda
