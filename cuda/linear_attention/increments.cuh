// The sums of each segment of a sequence, and from them the sums before (or after) each segment.
#pragma once

#include "linear_attention/chunk.cuh"

namespace based::cuda::linear {

template <class Tr>
struct IncrementSmem {
  alignas(128) PhiTile<Tr> phi;  // first: FeatureSums reads on behind it
  TokenTile<Tr> k[Tr::kIncrementStages];
  ValueTile v[Tr::kIncrementStages];
};

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1)
    increment_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  constexpr int kStages = Tr::kIncrementStages;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<IncrementSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_beside(a, place.slot, false);
  if (!seg.exists) return;  // so every chunk is whole
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v) / 8, length = int(seg.end - seg.begin);
  const auto prefetch = [&](int done) {
    const int64_t t = seg.begin + done;
    const int n = length - done, stage = done / kChunk % kStages;
    if (n > 0) {
      load_tile<Tr::D / 8, Element>(smem.k[stage], a.k, seg.batch, t, n, head, 0, Tr::D / 8);
      load_tile<kTileV / 8, Element>(smem.v[stage], a.v, seg.batch, t, n, head, first_v, valid);
    }
    cp_async_commit();
  };

  for (int i = 0; i < kStages; ++i) {
    zero_padding<Tr>(smem.k[i]), store_ones<Element>(smem.v[i], kChunk);
  }
  for (int i = 0; i < kStages - 1; ++i) prefetch(i * kChunk);
  StateSlice<Tr> state;
  FeatureSums<Tr> sums;
  state.clear();
  for (int done = 0; done < length; done += kChunk) {
    const int stage = done / kChunk % kStages;
    cp_async_wait<kStages - 2>();
    __syncthreads();
    prefetch(done + (kStages - 1) * kChunk);
    store_features<Tr>(smem.phi, smem.k[stage], 0);
    mma_publish();
    __syncthreads();
    update_state<Tr>(state, sums, smem.v[stage], smem.phi, smem.k[stage]);
    mma_wait<0>(state.sum);
  }
  float* workspace = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
  state.store(workspace);
  float* gZ = workspace + Tr::kF * kTileV;
  sums.for_each([&](int f, float value) { gZ[f] = value; });
}

// The sum of the segment before each border (kReverse: after it) becomes the sum of all segments of
// its sequence before (after) it. A CTA has the (border, head, tile) of a sequence's first border
// and one of `parts` of the state, a thread four floats at a time.
template <bool kReverse>
__global__ void __launch_bounds__(256)
    scan_kernel(const __grid_constant__ Arguments a, int state_quads, int parts) {
  constexpr int kAhead = 8;  // loads in flight
  const int64_t index = blockIdx.x / parts, per_border = int64_t(a.heads) * a.tiles;
  const int64_t border = index / per_border, sequence = sequence_at(a, border);
  if (first_border(a, sequence) != border) return;
  const Segment all = sequence_of(a, sequence);
  const int64_t count = (all.end - all.begin - 1) / a.segment;  // of its borders
  const int64_t stride = (kReverse ? -per_border : per_border) * state_quads;
  float4* const first = reinterpret_cast<float4*>(a.workspace) +
                        (index + (kReverse ? (count - 1) * per_border : 0)) * state_quads;
  for (int element = int(blockIdx.x % parts) * 256 + threadIdx.x; element < state_quads;
       element += 256 * parts) {
    float4* at = first + element;
    float4 sum = {0, 0, 0, 0};
    for (int64_t s = 0; s < count; s += kAhead) {
      float4 own[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        own[i] = s + i < count ? at[i * stride] : float4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        sum.x += own[i].x, sum.y += own[i].y, sum.z += own[i].z, sum.w += own[i].w;
        if (s + i < count) at[i * stride] = sum;
      }
      at += kAhead * stride;
    }
  }
}

}  // namespace based::cuda::linear
