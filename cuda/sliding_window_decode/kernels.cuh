// Sliding-window attention, one token per row.
//   out = softmax_s(scale <q, k_s>) v_s over the keys of the row's ring, this token's included
//
// Memory-bound: the ring of a head, 2 (W, V), is read once. One block per (row, head). kLanes lanes
// hold one key, each kChunks vectors of kVec elements of it; a block holds kKeys keys for every
// such group of lanes at a time, all of them loaded before the first is used. Every group keeps its
// own running maximum, sum and output; they meet at the end. Scores, weights and sums are fp32.
#pragma once

#include "primitives/decode_row.cuh"
#include "primitives/element.cuh"
#include "primitives/packed_vector.cuh"
#include "sliding_window_decode/tuning.h"

namespace based::cuda {

struct WindowDecodeArgs {
  const void *q, *k, *v;    // (B, H, V)
  void* out;                // (B, H, V)
  void *k_cache, *v_cache;  // (slots, W, H, V)
  const float *cos, *sin;   // (B, R), null: no rotation
  int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];
  int64_t k_cache_stride[3], v_cache_stride[3];
  int64_t cos_stride, sin_stride;
  IndexVector state_indices, positions;  // (B,)
  int64_t slots, heads, window;
  int V, rotary;  // R
  float scale;
};

// x (V,) as fp32 in shared memory, rotated: dim j < R by the angle j with dim j + R. Rounded to
// Element, as it would be by a rotation before the call.
template <class Element>
__device__ __forceinline__ void load_rotated(float* sX, const Element* gX, const float* cos,
                                             const float* sin, int V, int R) {
  for (int i = threadIdx.x; i < V; i += blockDim.x) {
    float x = to_float(gX[i]);
    if (i < 2 * R) {
      const int j = i < R ? i : i - R;
      const float other = to_float(gX[i < R ? i + R : j]);
      x = i < R ? x * cos[j] - other * sin[j] : x * cos[j] + other * sin[j];
      x = to_float(from_float<Element>(x));
    }
    sX[i] = x;
  }
}

// A softmax over some keys so far: weights relative to exp(max), their sum, the weighted values.
template <int kSize>
struct Partial {
  float max = kLowest, sum = 0, out[kSize] = {};
  static constexpr float kLowest = -3.402823466e38f;

  __device__ __forceinline__ void rescale(float new_max) {
    const float factor = __expf(max - new_max);
    max = new_max;
    sum *= factor;
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] *= factor;
  }
};

template <class Element, int kVec, int kChunks, int kLanes>
__global__ void __launch_bounds__(kWindowDecodeThreads, kWindowDecodeBlocksPerSM)
    sliding_window_decode_kernel(const __grid_constant__ WindowDecodeArgs a) {
  constexpr int kKeys = kWindowDecodeKeys<kChunks>, kGroups = kWindowDecodeThreads / kLanes;
  constexpr int kWarps = kWindowDecodeThreads / 32, kSize = kChunks * kVec;
  constexpr int kWidth = kLanes * kSize;  // >= V
  __shared__ float sQ[kWidth], sK[kWidth], sOut[kWarps][kWidth], sMax[kWarps], sSum[kWarps];
  const int64_t b = blockIdx.x / a.heads, h = blockIdx.x % a.heads;
  const int tid = threadIdx.x, V = a.V, lane = tid % kLanes, group = tid / kLanes;
  Element* gOut = static_cast<Element*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1];

  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  const int64_t position = row.kind == RowKind::kRun ? a.positions[b] : 0;
  const RowKind kind = position < 0 ? RowKind::kBad : row.kind;
  if (kind != RowKind::kRun) {
    for (int i = tid; i < V; i += kWindowDecodeThreads) {
      gOut[i] = from_float<Element>(filler(kind));
    }
    return;
  }
  // Slots fill up in order: those present are the first ones, and their order does not matter.
  const int64_t present = min(position, a.window - 1) + 1, current = position % a.window;
  const auto rows_of = [&](void* cache, const int64_t* stride) {
    return static_cast<Element*>(cache) + row.slot * stride[0] + h * stride[2];
  };
  Element* gK = rows_of(a.k_cache, a.k_cache_stride);
  Element* gV = rows_of(a.v_cache, a.v_cache_stride);
  const auto token = [&](const void* x, const int64_t* stride) {
    return static_cast<const Element*>(x) + b * stride[0] + h * stride[1];
  };
  const Element *new_k = token(a.k, a.k_stride), *new_v = token(a.v, a.v_stride);

  using Vec = Packed<Element, kVec>;
  Vec rK[kKeys][kChunks], rV[kKeys][kChunks];
  const auto load_keys = [&](int64_t first) {
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const int64_t s = first + n * kGroups + group;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int i = (c * kLanes + lane) * kVec;
        rK[n][c] = rV[n][c] = {};
        if (s >= present || i >= V) continue;
        // This token's own key and value do not come from the ring, they go there.
        Element* ring_v = gV + s * a.v_cache_stride[1] + i;
        rV[n][c] = *reinterpret_cast<const Vec*>(s == current ? new_v + i : ring_v);
        if (s == current) {
          *reinterpret_cast<Vec*>(ring_v) = rV[n][c];
        } else {
          rK[n][c] = *reinterpret_cast<const Vec*>(gK + s * a.k_cache_stride[1] + i);
        }
      }
    }
  };
  load_keys(0);

  const float* gCos = a.cos + b * a.cos_stride;
  const float* gSin = a.sin + b * a.sin_stride;
  load_rotated(sQ, token(a.q, a.q_stride), gCos, gSin, V, a.rotary);
  load_rotated(sK, new_k, gCos, gSin, V, a.rotary);
  __syncthreads();
  float rQ[kSize];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int at = (c * kLanes + lane) * kVec + i;
      rQ[c * kVec + i] = at < V ? sQ[at] * a.scale : 0.0f;
    }
  }

  Partial<kSize> part;
  for (int64_t first = 0; first < present; first += kKeys * kGroups) {
    if (first > 0) load_keys(first);
    float score[kKeys];
    float max = part.max;
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const int64_t s = first + n * kGroups + group;
      score[n] = 0;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = (c * kLanes + lane) * kVec;
        if (s == current && at < V) {
          rK[n][c].from_floats(sK + at);
          *reinterpret_cast<Vec*>(gK + s * a.k_cache_stride[1] + at) = rK[n][c];
        }
        float key[kVec];
        rK[n][c].to_floats(key);
#pragma unroll
        for (int i = 0; i < kVec; ++i) score[n] += rQ[c * kVec + i] * key[i];
      }
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
#pragma unroll
      for (int n = 0; n < kKeys; ++n) score[n] += __shfl_xor_sync(0xffffffffu, score[n], mask);
    }
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      if (first + n * kGroups + group < present) max = fmaxf(max, score[n]);
    }
    part.rescale(max);
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      const bool there = first + n * kGroups + group < present;
      const float weight = there ? __expf(score[n] - max) : 0.0f;
      part.sum += weight;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float value[kVec];
        rV[n][c].to_floats(value);
#pragma unroll
        for (int i = 0; i < kVec; ++i) part.out[c * kVec + i] += weight * value[i];
      }
    }
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int mask = kLanes; mask < 32; mask *= 2) {
    part.rescale(fmaxf(part.max, __shfl_xor_sync(0xffffffffu, part.max, mask)));
    part.sum += __shfl_xor_sync(0xffffffffu, part.sum, mask);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      part.out[i] += __shfl_xor_sync(0xffffffffu, part.out[i], mask);
    }
  }
  const int warp = tid / 32;
  if (tid % 32 < kLanes) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        sOut[warp][(c * kLanes + lane) * kVec + e] = part.out[c * kVec + e];
      }
    }
    if (lane == 0) sMax[warp] = part.max, sSum[warp] = part.sum;
  }
  __syncthreads();
  float max = sMax[0], sum = 0, factor[kWarps];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) max = fmaxf(max, sMax[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    factor[w] = __expf(sMax[w] - max);
    sum += factor[w] * sSum[w];
  }
  for (int i = tid; i < V; i += kWindowDecodeThreads) {
    float out = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) out += factor[w] * sOut[w][i];
    gOut[i] = from_float<Element>(out / sum);
  }
}

}  // namespace based::cuda
