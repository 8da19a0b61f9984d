// Sliding-window attention, one token per row.
//   out = softmax_s(scale <q, k_s>) v_s over the keys of the row's ring, this token's included
//
// Memory-bound: the ring of a head, 2 (W, V), is read once. One block per (row, head). kLanes lanes
// hold one key, each kChunks vectors of kVec elements of it; every such group of lanes takes kKeys
// keys and values at a time into registers, all on their way before the first is needed: as few
// instructions as possible come before them. A warp keeps a running maximum, a group its sum and
// output; they meet at the end. Scores, weights and sums are fp32.
#pragma once

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

// A part of a row of the ring, which is read once: the first to leave the caches.
template <int kVec, class Element>
__device__ __forceinline__ Vector<Element, kVec> load_once(const Element* from) {
  if constexpr (sizeof(Element) * kVec == 16) {
    const uint4 x = __ldcs(reinterpret_cast<const uint4*>(from));
    return {{x.x, x.y, x.z, x.w}};
  } else {
    return load_vector<kVec>(from);
  }
}

// 2^x; 0 where that is no normal number.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <class Element, int kVec, int kChunks, int kLanes>
__global__ void __launch_bounds__(kWindowDecodeThreads, kWindowDecodeBlocksPerSM<Element>)
    sliding_window_decode_kernel(const __grid_constant__ WindowDecodeArgs a) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  using Vec = Vector<Element, kVec>;
  constexpr int kKeys = kWindowDecodeKeys<kChunks>, kThreads = kWindowDecodeThreads;
  constexpr int kWarps = kThreads / 32, kGroups = kThreads / kLanes;
  constexpr int kSize = kChunks * kVec, kWidth = kLanes * kSize;  // of a lane, of a group: >= V
  __shared__ __align__(16) float sQ[kWidth], sK[kWidth], sV[kWidth], sOut[kWarps][kWidth];
  __shared__ float sMax[kWarps], sSum[kWarps];
  const int64_t b = blockIdx.x / unsigned(a.heads), h = blockIdx.x % unsigned(a.heads);
  const int tid = threadIdx.x, V = a.V, lane = tid % kLanes, group = tid / kLanes;
  Element* gOut = static_cast<Element*>(a.out) + b * a.out_stride[0] + h * a.out_stride[1];

  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  const int64_t position = a.positions[b];
  const RowKind kind = row.kind == RowKind::kRun && position < 0 ? RowKind::kBad : row.kind;
  if (kind != RowKind::kRun) {
#pragma unroll 1
    for (int i = tid; i < V; i += kThreads) gOut[i] = from_float<Element>(filler(kind));
    return;
  }
  // Slots fill up in order: those present are the first ones, and their order does not matter. This
  // token's own key and value do not come from the ring, they go there.
  const int present = static_cast<int>(min(position, int64_t(a.window - 1))) + 1;
  const int current = static_cast<int>(position % a.window);
  const auto there = [&](int s) { return s < present && s != current; };
  const auto ring_of = [&](void* cache, const int64_t* stride) {
    return static_cast<Element*>(cache) + row.slot * stride[0] + h * stride[2];
  };
  Element* gKeys = ring_of(a.k_cache, a.k_cache_stride);
  Element* gValues = ring_of(a.v_cache, a.v_cache_stride);

  // This lane's part of rows s, s + kGroups, ...; zeros where there are none.
  Vec keys[kKeys][kChunks], values[kKeys][kChunks];
  const int64_t key_step = a.k_cache_stride[1], value_step = a.v_cache_stride[1];
  const auto fetch = [&](int s) {
    const Element* key = gKeys + s * key_step + lane * kVec;
    const Element* value = gValues + s * value_step + lane * kVec;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int at = c * kLanes * kVec;
        const bool valid = there(s + j * kGroups) && lane * kVec + at < V;
        keys[j][c] = valid ? load_once<kVec>(key + at) : Vec{};
        values[j][c] = valid ? load_once<kVec>(value + at) : Vec{};
      }
      key += kGroups * key_step, value += kGroups * value_step;
    }
  };
  fetch(group);

  // q, k and v in fp32; with the scale and log2(e) in q, weights are powers of two. Dim j < R is
  // rotated with dim j + R, by the angle j, and rounded, as by a rotation before the call.
  const auto row_of = [&](const void* x, const int64_t* stride) {
    return static_cast<const Element*>(x) + b * stride[0] + h * stride[1];
  };
  const Element *gQ = row_of(a.q, a.q_stride), *gK = row_of(a.k, a.k_stride);
  const Element* gV = row_of(a.v, a.v_stride);
#pragma unroll 1
  for (int i = tid; i < kWidth; i += kThreads) {
    Element q{}, k{}, v{};
    if (i < V) {
      q = gQ[i], k = gK[i], v = gV[i];
      if (i < 2 * a.rotary) {
        const bool low = i < a.rotary;
        const int other = low ? i + a.rotary : i - a.rotary, j = low ? i : other;
        const Element other_q = gQ[other], other_k = gK[other];
        const float cos = a.cos[b * a.cos_stride + j], sin = a.sin[b * a.sin_stride + j];
        const auto rotated = [&](Element x, Element y) {
          return from_float<Element>(to_float(x) * cos + to_float(y) * (low ? -sin : sin));
        };
        q = rotated(q, other_q), k = rotated(k, other_k);
      }
    }
    sQ[i] = to_float(q) * (a.scale * 1.44269504f), sK[i] = to_float(k), sV[i] = to_float(v);
  }
  __syncthreads();

  // Every warp begins with the score of the token itself, the first group with its value too.
  float query[kSize], out[kSize], max = 0, sum = group == 0 ? 1.0f : 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int at = (c * kLanes + lane) * kVec + i;
      query[c * kVec + i] = sQ[at];
      max += sQ[at] * sK[at];
      out[c * kVec + i] = group == 0 ? sV[at] : 0.0f;
    }
  }
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) max += __shfl_xor_sync(0xffffffffu, max, mask);

  for (int first = 0;;) {
    float score[kKeys] = {}, new_max = max;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) score[j] += query[c * kVec + i] * keys[j][c][i];
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
#pragma unroll
      for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        score[j] += __shfl_xor_sync(0xffffffffu, score[j], mask);
      }
      if (!there(first + group + j * kGroups)) score[j] = -INFINITY;
      new_max = fmaxf(new_max, score[j]);
    }
#pragma unroll
    for (int mask = kLanes; mask < 32; mask *= 2) {
      new_max = fmaxf(new_max, __shfl_xor_sync(0xffffffffu, new_max, mask));
    }
    const float factor = power_of_two(max - new_max);
    max = new_max, sum *= factor;
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] *= factor;
#pragma unroll
    for (int j = 0; j < kKeys; ++j) {
      const float weight = power_of_two(score[j] - max);
      sum += weight;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) out[c * kVec + i] += weight * values[j][c][i];
      }
    }
    first += kKeys * kGroups;
    if (first >= present) break;
    fetch(first + group);
  }

  // The groups of a warp, then the warps.
#pragma unroll
  for (int mask = kLanes; mask < 32; mask *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, mask);
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] += __shfl_xor_sync(0xffffffffu, out[i], mask);
  }
  const int warp = tid / 32;
  if (tid % 32 < kLanes) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) sOut[warp][(c * kLanes + lane) * kVec + i] = out[c * kVec + i];
    }
    if (lane == 0) sMax[warp] = max, sSum[warp] = sum;
  }
  __syncthreads();
  float total = 0, factor[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; ++w) max = fmaxf(max, sMax[w]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    factor[w] = power_of_two(sMax[w] - max);
    total += factor[w] * sSum[w];
  }
#pragma unroll 1
  for (int i = tid; i < V; i += kThreads) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) x += factor[w] * sOut[w][i];
    gOut[i] = from_float<Element>(x / total);
    gKeys[current * key_step + i] = from_float<Element>(sK[i]);
    gValues[current * value_step + i] = from_float<Element>(sV[i]);
  }
}

}  // namespace based::cuda
