// What follows a product of decode_block: sums of the spans of K, then bias, SwiGLU or residual.
//
// Of eight rows of x a thread has two, and of the tile two rows, eight apart, as wgmma leaves them:
// (x row, tile row), (x row + 1, tile row), (x row, tile row + 8), (x row + 1, tile row + 8). With
// SwiGLU the first two are values and the others their gates.
#pragma once

#include "decode_block/stage.cuh"

namespace based::cuda {

__device__ __forceinline__ void meet_computing() {
  asm volatile("barrier.sync 2, 256;" ::: "memory");
}

// Gives the sums to those who add them up.
template <int kRows>
__device__ __forceinline__ void give_sums(const float (&sums)[kRows / 2],
                                          BlockShared<kRows>& shared, const BlockStage& stage,
                                          const BlockWork& work) {
  meet_computing();  // x was read
#pragma unroll
  for (int group = 0; group < kRows / 8; ++group) {
    if (group >= work.groups) break;
    *shared.own_sums(group) = {sums[4 * group], sums[4 * group + 1], sums[4 * group + 2],
                               sums[4 * group + 3]};
  }
  fence_proxy_async();
  meet_computing();
  const int other = static_cast<int>(threadIdx.x);
  if (other < stage.splits && other != work.part) {
    const int begin = other * work.groups / stage.splits;
    const int count = (other + 1) * work.groups / stage.splits - begin;
    using Shared = BlockShared<kRows>;
    if (count > 0) {
      copy_to_rank(shared_address(shared.sums) + work.part * count * Shared::kGroupBytes,
                   shared_address(shared.x) + begin * Shared::kGroupBytes,
                   count * Shared::kGroupBytes, shared.sums_full, work.leader + other);
    }
  }
}

// Two neighbouring rows of out, and one column or two.
template <bool kSwiglu>
struct BlockPlace {
  static constexpr int kColumns = kSwiglu ? 1 : 2;

  int column, in_group;
  bool inside[kColumns];

  __device__ __forceinline__ BlockPlace(const BlockStage& stage, const BlockWork& work) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    column = (work.tile * 8 + warp) * 8 * kColumns + lane / 4, in_group = lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) inside[c] = column + 8 * c < stage.columns;
  }
  // fn(i, row, column): element i of a thread's in a group, if it is one of out.
  template <class Fn>
  __device__ __forceinline__ void for_each(const BlockArgs& args, int group, const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < 2 * kColumns; ++i) {
      const int row = group * 8 + in_group + i % 2;
      if (row < args.rows && inside[i / 2]) fn(i, row, column + i / 2 * 8);
    }
  }
};

// out <- this CTA's rows of a tile.
template <int kSplits, bool kSwiglu, int kRows>
__device__ __forceinline__ void finish_tile(BlockShared<kRows>& shared, const BlockArgs& args,
                                            const BlockStage& stage, const BlockWork& work,
                                            int parity) {
  constexpr int kBatch = 2;  // groups at a time
  using Place = BlockPlace<kSwiglu>;
  const Place place(stage, work);
  const bool scaled = stage.squares != nullptr, adds = !kSwiglu && stage.norm != nullptr;
  const int count = work.end - work.begin;
  float bias[Place::kColumns] = {}, norm[Place::kColumns] = {};
#pragma unroll
  for (int c = 0; c < Place::kColumns; ++c) {
    if (!place.inside[c]) continue;
    if (!kSwiglu && stage.bias != nullptr) bias[c] = to_float(stage.bias[place.column + 8 * c]);
    if (adds) norm[c] = to_float(stage.norm[place.column + 8 * c]);
  }
  // Of every warp and row; they lie where this CTA would send itself its sums.
  float* const warp_squares = reinterpret_cast<float*>(shared.sums) +
                              work.part * count * (BlockShared<kRows>::kGroupBytes / 4);
  float residual[kBatch][4] = {};
  const auto load_residual = [&](int first) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      place.for_each(args, work.begin + first + b, [&](int i, int row, int column) {
        residual[b][i] = __ldcg(stage.residual + row * stage.residual_stride + column);
      });
    }
  };
  if (adds) load_residual(0);
  if (scaled) asm volatile("barrier.sync 1, 288;" ::: "memory");  // with those who computed scales
  if (count > 0 && kSplits > 1) shared.sums_full.wait(parity);
#pragma unroll 1
  for (int first = 0; first < count; first += kBatch) {
    if (adds && first > 0) load_residual(first);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int in_share = first + b, group = work.begin + in_share;
      if (in_share >= count) break;
      float y[4] = {}, squares[2] = {};
#pragma unroll
      for (int part = 0; part < kSplits; ++part) {
        const float4 x = part == work.part ? *shared.own_sums(group)
                                           : *shared.others_sums(part * count + in_share);
        y[0] += x.x, y[1] += x.y, y[2] += x.z, y[3] += x.w;
      }
      // What is none of out is computed too, and not stored: 0 in columns, anything in rows.
#pragma unroll
      for (int i = 0; i < 2 * Place::kColumns; ++i) {
        const float scale = scaled ? shared.scales[group * 8 + place.in_group + i % 2] : 1.0f;
        y[i] = y[i] * scale + bias[i / 2];
        if constexpr (kSwiglu) {
          const float gate = y[i + 2] * scale;
          y[i] = __fdividef(y[i] * gate, 1.0f + __expf(-gate));
        }
        if (adds) {
          y[i] += residual[b][i];
          squares[i % 2] += y[i] * y[i];
        }
      }
      place.for_each(args, group, [&](int i, int row, int column) {
        if (adds) {
          stage.residual_out[int64_t(row) * stage.columns + column] = y[i];
          y[i] *= norm[i / 2];
        }
        stage.out[row * stage.out_stride + column] = from_float<BlockElement>(y[i]);
      });
      if (adds) {  // of the warp's 16 columns
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int mask = 4; mask < 32; mask *= 2) {
            squares[i] += __shfl_xor_sync(~0u, squares[i], mask);
          }
          if (threadIdx.x % 32 < 4) {
            warp_squares[threadIdx.x / 32 * 8 * count + in_share * 8 + place.in_group + i] =
                squares[i];
          }
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
      stage.squares_out[work.tile * kDecodeBlockMaxRows + work.begin * 8 + row] = sum;
    }
    meet_computing();
  }
}

}  // namespace based::cuda
