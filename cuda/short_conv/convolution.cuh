// What the short-convolution kernels share. Channels are independent: a thread has kVec
// neighbouring ones, a warp reads 32 vectors of a token side by side, and time runs inside the
// thread, whose last K inputs stay in registers. All sums are fp32.
#pragma once

#include "primitives/packed.cuh"
#include "primitives/sigmoid.cuh"
#include "primitives/vector.cuh"
#include "short_conv/tuning.h"

namespace based::cuda {

// A (B, T, C) tensor, or a state (N, C, K-1); no data when it is not given. The last dimension is
// contiguous.
struct Slab {
  void* data;
  int64_t stride0, stride1;
};

inline Slab slab(const TensorView& view) {
  if (view.rank < 0) return {nullptr, 0, 0};
  return {view.data, view.stride[0], view.stride[1]};
}

struct ConvArgs {
  Slab x, gate, out;          // (B, T, C)
  Slab initial, final_state;  // (N, C, K-1)
  Slab weight;                // (C, K): stride0 from channel to channel
  const void* bias;           // (C,)
  IndexVector cu_seqlens;     // (N+1,)
  int64_t seqlen;
  int64_t row_tiles;  // blocks along T in each batch row
  int channels, channel_tiles;
  bool silu;
  bool dense_weight;  // rows of weight follow each other, aligned for vectors
};

struct ConvBackwardArgs : ConvArgs {
  Slab dout, dx, dgate;   // (B, T, C)
  Slab dfinal, dinitial;  // (N, C, K-1)
  Slab dweight;           // (C, K)
  void* dbias;            // (C,)
  float* partials;        // (tiles, K+1, C): each block's part of dweight and dbias
  int64_t tiles;
};

// Element (row, 0, channel), or (row, t, channel), of a slab.
template <class Element>
__device__ __forceinline__ const Element* row_of(const Slab& slab, int64_t row, int channel) {
  return static_cast<const Element*>(slab.data) + row * slab.stride0 + channel;
}

template <class Element>
__device__ __forceinline__ const Element* token_of(const Slab& slab, int64_t row, int64_t t,
                                                   int channel) {
  return row_of<Element>(slab, row, channel) + t * slab.stride1;
}

template <class Element>
__device__ __forceinline__ Element* mutable_token_of(const Slab& slab, int64_t row, int64_t t,
                                                     int channel) {
  return const_cast<Element*>(token_of<Element>(slab, row, t, channel));
}

// Whether there is an activation and a gate. The wide kernels know when they are compiled (1 or 0):
// a branch around the activation would chain its special-function calls one after the other.
template <int kSilu = -1, int kGated = -1>
struct ConvMode {
  __device__ __forceinline__ static bool silu(const ConvArgs& args) {
    return kSilu < 0 ? args.silu : kSilu == 1;
  }
  __device__ __forceinline__ static bool gated(const ConvArgs& args) {
    return kGated < 0 ? args.gate.data != nullptr : kGated == 1;
  }
};

// The K-1 values of a channel in a state.
template <class Element>
__device__ __forceinline__ Element* state_of(const Slab& state, int64_t n, int channel) {
  return mutable_token_of<Element>(state, n, channel, 0);
}

// The batch row, first token and channels of a thread. Neighbouring blocks are neighbouring
// channels.
struct ConvPlace {
  int64_t row, begin, end;
  int channel;
};

template <class Tile, int kVec>
__device__ __forceinline__ ConvPlace conv_place(const ConvArgs& args) {
  const int64_t tile = blockIdx.x / unsigned(args.channel_tiles);
  const int block = blockIdx.x % unsigned(args.channel_tiles);
  const int lane = threadIdx.x % kConvLanes, group = threadIdx.x / kConvLanes;
  const int64_t row = tile / args.row_tiles;
  const int64_t begin = (tile % args.row_tiles) * Tile::kTokens + group * Tile::kRun;
  return {row, begin, min(begin + Tile::kRun, args.seqlen), (block * kConvLanes + lane) * kVec};
}

__device__ __forceinline__ Span span_at(const ConvArgs& args, int64_t row, int64_t t) {
  if (args.cu_seqlens.data == nullptr) return {row, 0, args.seqlen};
  return sequence_at(args.cu_seqlens, t, args.seqlen);
}

// The place of a thread: sequence (or row) n and a channel; false when there is none.
__device__ __forceinline__ bool state_place(const ConvArgs& args, int64_t rows, int64_t& n,
                                            int& channel) {
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  n = index / args.channels, channel = static_cast<int>(index % args.channels);
  return n < rows;
}

__device__ __forceinline__ Span state_span(const ConvArgs& args, int64_t n) {
  if (args.cu_seqlens.data == nullptr) return {n, 0, args.seqlen};
  return sequence(args.cu_seqlens, n, args.seqlen);
}

// What stands for a value that is nowhere: 0 before and after a sequence, NaN outside of all.
__device__ __forceinline__ float absent(const Span& span) {
  return span.n < 0 ? __int_as_float(0x7fffffff) : 0.0f;
}

// The filter of kVec channels, and the last kTaps inputs, oldest first.
template <class Element, int kTaps, int kVec>
struct Convolution {
  float weight[kTaps][kVec], bias[kVec], window[kTaps][kVec];

  __device__ __forceinline__ void load_filter(const ConvArgs& args, int channel) {
    const Element* gWeight = row_of<Element>(args.weight, channel, 0);
    const Element* gBias = static_cast<const Element*>(args.bias);
    Vector<Element, kVec> rows[kTaps];  // (kVec, kTaps), as in memory
    if (args.dense_weight) {
#pragma unroll
      for (int n = 0; n < kTaps; ++n) rows[n] = load_vector<kVec>(gWeight + n * kVec);
    }
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      bias[i] = gBias == nullptr ? 0.0f : to_float(gBias[channel + i]);
#pragma unroll
      for (int j = 0; j < kTaps; ++j) {
        const int place = i * kTaps + j;
        weight[j][i] = args.dense_weight ? rows[place / kVec][place % kVec]
                                         : to_float(gWeight[i * args.weight.stride0 + j]);
      }
    }
  }

  // Makes t the next token of a span: the K-1 inputs before it, from x, from the initial state, or
  // zeros. A token of no sequence gets NaN, which its output then is.
  __device__ __forceinline__ void start(const ConvArgs& args, const Element* gX, const Span& span,
                                        int64_t t, int channel) {
#pragma unroll
    for (int j = 1; j < kTaps; ++j) {
      const int64_t s = t - kTaps + j;
      if (s >= span.begin) {
        const Vector<Element, kVec> input = load_vector<kVec>(gX + s * args.x.stride1);
#pragma unroll
        for (int i = 0; i < kVec; ++i) window[j][i] = input[i];
        continue;
      }
      const bool stored = args.initial.data != nullptr && span.n >= 0;
      const Element* gState =
          state_of<Element>(args.initial, span.n, channel) + (s - span.begin + kTaps - 1);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        window[j][i] = stored ? to_float(gState[i * args.initial.stride1]) : absent(span);
      }
    }
  }

  __device__ __forceinline__ void push(const Vector<Element, kVec>& input) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
#pragma unroll
      for (int j = 1; j < kTaps; ++j) window[j - 1][i] = window[j][i];
      window[kTaps - 1][i] = input[i];
    }
  }

  __device__ __forceinline__ float sum(int i) const {
    float total = bias[i];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) total += weight[j][i] * window[j][i];
    return total;
  }
};

}  // namespace based::cuda
