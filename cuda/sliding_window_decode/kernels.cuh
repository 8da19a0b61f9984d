// Sliding-window attention, one token per row.
//   out = softmax_s(scale <q, k_s>) v_s over the keys of the row's ring, this token's included
//
// Memory-bound: the ring of a head, 2 (W, V), is read once. One block per (row, head). kLanes lanes
// hold one key, each kChunks vectors of kVec elements of it; every such group of lanes walks its
// share of the keys, kStages of them on their way to shared memory. A group keeps its own running
// maximum, sum and output; they meet at the end. Scores, weights and sums are fp32.
#pragma once

#include "primitives/cp_async.cuh"
#include "primitives/decode_row.cuh"
#include "primitives/early_launch.cuh"
#include "primitives/element.cuh"
#include "primitives/vector.cuh"
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
  int64_t slots;
  int heads, window, V, rotary;  // R
  float scale;
};

// Element i of x (V,), rotated: dim j < R by the angle j with dim j + R. Rounded to Element, as it
// would be by a rotation before the call.
template <class Element>
__device__ __forceinline__ float rotated(const Element* gX, int i, const float* cos,
                                         const float* sin, int R) {
  const float x = to_float(gX[i]);
  if (i >= 2 * R) return x;
  const int j = i < R ? i : i - R;
  const float other = to_float(gX[i < R ? i + R : j]);
  const float y = i < R ? x * cos[j] - other * sin[j] : x * cos[j] + other * sin[j];
  return to_float(from_float<Element>(y));
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

// kVec elements from global to shared memory: 16 bytes asynchronously, a lone element at once.
template <class Element, int kVec>
__device__ __forceinline__ void fetch(Vector<Element, kVec>* slot, const Element* source) {
  if constexpr (sizeof(*slot) == 16) {
    cp_async_16(static_cast<uint32_t>(__cvta_generic_to_shared(slot)), source, true);
  } else {
    *slot = *reinterpret_cast<const Vector<Element, kVec>*>(source);
  }
}

template <class Element, int kVec, int kChunks, int kLanes>
__global__ void __launch_bounds__(kWindowDecodeThreads, kWindowDecodeBlocksPerSM<kChunks>)
    sliding_window_decode_kernel(const __grid_constant__ WindowDecodeArgs a) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  using Vec = Vector<Element, kVec>;
  constexpr int kStages = kWindowDecodeStages;
  constexpr int kThreads = kWindowDecodeThreads, kWarps = kThreads / 32;
  constexpr int kGroups = kThreads / kLanes, kSize = kChunks * kVec;
  constexpr int kWidth = kLanes * kSize;  // >= V
  __shared__ Vec sKeys[kStages][kChunks][kThreads], sValues[kStages][kChunks][kThreads];
  __shared__ float sQ[kWidth], sK[kWidth], sV[kWidth];
  __shared__ float sOut[kWarps][kWidth], sMax[kWarps], sSum[kWarps];
  const int64_t b = blockIdx.x / unsigned(a.heads), h = blockIdx.x % unsigned(a.heads);
  const int tid = threadIdx.x, V = a.V, lane = tid % kLanes, group = tid / kLanes;
  Element* gOut = static_cast<Element*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1];

  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  const int64_t position = a.positions[b];
  const RowKind kind = row.kind == RowKind::kRun && position < 0 ? RowKind::kBad : row.kind;
  if (kind != RowKind::kRun) {
    for (int i = tid; i < V; i += kThreads) gOut[i] = from_float<Element>(filler(kind));
    return;
  }
  // Slots fill up in order: those present are the first ones, and their order does not matter.
  const int present = static_cast<int>(min(position, int64_t(a.window - 1))) + 1;
  const int current = static_cast<int>(position % a.window);
  const auto rows_of = [&](void* cache, const int64_t* stride) {
    return static_cast<Element*>(cache) + row.slot * stride[0] + h * stride[2];
  };
  Element* gK = rows_of(a.k_cache, a.k_cache_stride);
  Element* gV = rows_of(a.v_cache, a.v_cache_stride);

  // A thread reads back only what it fetched itself, so no barrier is between the two. This token's
  // own key and value do not come from the ring, they go there.
  int next = group;  // the next key of this group to fetch
  const auto fetch_stage = [&](int stage) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int i = (c * kLanes + lane) * kVec;
      if (next >= present || next == current || i >= V) continue;
      fetch<Element, kVec>(&sKeys[stage][c][tid], gK + next * a.k_cache_stride[1] + i);
      fetch<Element, kVec>(&sValues[stage][c][tid], gV + next * a.v_cache_stride[1] + i);
    }
    cp_async_commit();
    next += kGroups;
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) fetch_stage(stage);

  const auto token = [&](const void* x, const int64_t* stride) {
    return static_cast<const Element*>(x) + b * stride[0] + h * stride[1];
  };
  const float* gCos = a.cos + b * a.cos_stride;
  const float* gSin = a.sin + b * a.sin_stride;
  const Element *gNewQ = token(a.q, a.q_stride), *gNewK = token(a.k, a.k_stride);
  const Element* gNewV = token(a.v, a.v_stride);
  for (int i = tid; i < V; i += kThreads) {
    const float q = rotated(gNewQ, i, gCos, gSin, a.rotary);
    const float k = rotated(gNewK, i, gCos, gSin, a.rotary);
    const float v = to_float(gNewV[i]);
    sQ[i] = q * a.scale, sK[i] = k, sV[i] = v;
    gK[current * a.k_cache_stride[1] + i] = from_float<Element>(k);
    gV[current * a.v_cache_stride[1] + i] = from_float<Element>(v);
  }
  __syncthreads();
  float rQ[kSize];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int at = (c * kLanes + lane) * kVec + i;
      rQ[c * kVec + i] = at < V ? sQ[at] : 0.0f;
    }
  }
  // Chunk c of key or value s, as fp32; 0 past V.
  const auto read = [&](float* x, const Vec& fetched, const float* own, int c, int s) {
    const int at = (c * kLanes + lane) * kVec;
    if (s == current && at < V) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = own[at + i];
    } else if (s < present && at < V) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = fetched[i];
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) x[i] = 0.0f;
    }
  };

  Partial<kSize> part;
  int stage = 0;
  for (int first = 0; first < present; first += kGroups) {
    const int s = first + group;
    cp_async_wait<kStages - 1>();
    float score = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float key[kVec];
      read(key, sKeys[stage][c][tid], sK, c, s);
#pragma unroll
      for (int i = 0; i < kVec; ++i) score += rQ[c * kVec + i] * key[i];
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      score += __shfl_xor_sync(0xffffffffu, score, mask);
    }
    const bool there = s < present;
    part.rescale(there ? fmaxf(part.max, score) : part.max);
    const float weight = there ? __expf(score - part.max) : 0.0f;
    part.sum += weight;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float value[kVec];
      read(value, sValues[stage][c][tid], sV, c, s);
#pragma unroll
      for (int i = 0; i < kVec; ++i) part.out[c * kVec + i] += weight * value[i];
    }
    fetch_stage(stage);
    stage = stage + 1 < kStages ? stage + 1 : 0;
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
  for (int i = tid; i < V; i += kThreads) {
    float out = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) out += factor[w] * sOut[w][i];
    gOut[i] = from_float<Element>(out / sum);
  }
}

}  // namespace based::cuda
