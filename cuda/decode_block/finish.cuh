// What follows a product of decode_block: sums of the spans of K, then bias, SwiGLU or residual.
#pragma once

#include "decode_block/stage.cuh"

namespace based::cuda {

template <int kSplits>
__device__ __forceinline__ void add_parts(float (&sum)[4], const float4 (&parts)[kSplits]) {
#pragma unroll
  for (const float4& part : parts) {
    sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
  }
}

// Four columns of out, the first of them `column`, in one row.
__device__ __forceinline__ void store_columns(const BlockStage& stage, int row, int column,
                                              const float (&y)[4]) {
  BlockElement* const to = stage.out + row * stage.out_stride + column;
  if (stage.vectors) {
    if (column < stage.columns) store_vector(to, y);
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (column + c < stage.columns) to[c] = from_float<BlockElement>(y[c]);
    }
  }
}

// Four values of a vector, 0 behind its end.
template <class T>
__device__ __forceinline__ void load_columns(float (&y)[4], const T* from, int column, int end) {
#pragma unroll
  for (int c = 0; c < 4; ++c) y[c] = column + c < end ? to_float(from[column + c]) : 0.0f;
}

// out <- this CTA's share of the rows of a tile, summed over the CTAs that share K. A warp has all
// columns of a row, with SwiGLU of two rows.
template <int kSplits, bool kSwiglu, int kRows>
__device__ __forceinline__ void finish_tile(const BlockShared<kRows>& shared, const BlockArgs& args,
                                            const BlockStage& stage, const BlockWork& work) {
  constexpr int kColumns = kSwiglu ? kBlockTile / 2 : kBlockTile;  // of out
  constexpr int kThreads = kColumns / 4, kStep = kBlockComputing / kThreads;
  constexpr int kBatch = kSplits < 4 ? 4 / kSplits : 1;  // rows whose parts are on their way
  const int in_tile = threadIdx.x % kThreads * 4, column = work.tile * kColumns + in_tile;
  const int share = (args.rows + kSplits - 1) / kSplits;
  const int end = min(args.rows, (work.part + 1) * share);
  float bias[4] = {}, norm[4] = {};
  if (!kSwiglu && stage.bias != nullptr) load_columns(bias, stage.bias, column, stage.columns);
  if (!kSwiglu && stage.norm != nullptr) load_columns(norm, stage.norm, column, stage.columns);
#pragma unroll 1
  for (int first = work.part * share + threadIdx.x / kThreads; first < end;
       first += kBatch * kStep) {
    float4 parts[kBatch][kSplits], gates[kSwiglu ? kBatch : 1][kSplits];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kStep;
      if (row >= end) break;
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        parts[i][r] = load_remote(shared.sum(row, in_tile), work.leader + r);
        if constexpr (kSwiglu) {
          gates[i][r] = load_remote(shared.sum(row, in_tile + kColumns), work.leader + r);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * kStep;
      if (row >= end) break;
      const float scale = stage.squares != nullptr ? shared.scales[row] : 1.0f;
      float y[4] = {};
      add_parts(y, parts[i]);
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] = y[c] * scale + bias[c];
      if constexpr (kSwiglu) {
        float gate[4] = {};
        add_parts(gate, gates[i]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          gate[c] *= scale;
          y[c] *= gate[c] / (1.0f + __expf(-gate[c]));
        }
      }
      if (!kSwiglu && stage.norm != nullptr) {
        float squares = 0.0f;
        const float* const from = stage.residual + row * stage.residual_stride + column;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          y[c] += column + c < stage.columns ? __ldcg(from + c) : 0.0f;
          squares += y[c] * y[c];
        }
        if (column < stage.columns) {
          store_vector(stage.residual_out + int64_t(row) * stage.columns + column, y);
        }
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) squares += __shfl_xor_sync(~0u, squares, mask);
        if (threadIdx.x % 32 == 0) {
          stage.squares_out[work.tile * kDecodeBlockMaxRows + row] = squares;
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] *= norm[c];
      }
      store_columns(stage, row, column, y);
    }
  }
}

}  // namespace based::cuda
