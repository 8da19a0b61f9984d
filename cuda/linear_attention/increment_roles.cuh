// The sums of each segment, as increments.cuh and backward_dq.cuh compute them, for sm_90a and
// feature_dim up to 16: three warpgroups of a CTA take the segment's chunks in turns, each with a
// state of its own; the three are added at the end.
#pragma once

#include "linear_attention/role_gradients.cuh"

namespace based::cuda::linear {

constexpr int kIncrementGroups = 3, kIncrementThreads = kIncrementGroups * kGroupThreads;

template <class Tr>
struct IncrementRoleSmem {
  static constexpr int kStages = 2;
  struct Group {
    alignas(128) SpanPhi<Tr> phi;
    SpanTokens<Tr> x[kStages];
    CoreTile<kSpan, kTileV> y[kStages];
    CoreTile<kSpan, 8> ones;
    float delta[kSpan];
    __device__ float* sums() { return reinterpret_cast<float*>(this); }  // once all chunks are done
  } group[kIncrementGroups];
  static_assert(sizeof(Group) >= kStateFloats<Tr> * sizeof(float));
};

// S and z of k and v; or (kGradient) R and r of q and u.
template <class Tr, bool kGradient>
__global__ void __launch_bounds__(kIncrementThreads, 1)
    increment_roles_kernel(const __grid_constant__ Arguments a) {
  if constexpr (kHasWgmma) {
    using Element = typename Tr::Element;
    using Smem = IncrementRoleSmem<Tr>;
    constexpr int kStages = Smem::kStages;
    extern __shared__ __align__(128) char raw[];
    auto& smem = *reinterpret_cast<Smem*>(raw);
    const Place place(a);
    const Segment seg = segment_beside(a, place.slot, kGradient);
    if (!seg.exists) return;
    const int head = place.head, first_v = place.tile * kTileV;
    const int valid = min(kTileV, a.head_dim - first_v) / 8, length = int(seg.end - seg.begin);
    const int turn = warpgroup_index(), thread = thread_index() % kGroupThreads, lane = thread % 32;
    auto& own = smem.group[turn];
    const Rows &gX = kGradient ? a.q : a.k, &gY = kGradient ? a.dout : a.v;
    SpanLoader<Element, Tr::D / 8> x(thread, gX, seg, head, 0, turn);
    SpanLoader<Element, kTileV / 8> y(thread, gY, seg, head, first_v, turn);
    uint4 held_x[decltype(x)::kPasses], held_y[decltype(y)::kPasses];
    const auto fetch = [&](int n) {  // the n-th chunk of this warpgroup
      const int rows = length - (kIncrementGroups * n + turn) * kSpan;
      x.template fetch<kIncrementGroups>(thread, held_x, gX.token, rows);
      y.template fetch<kIncrementGroups>(thread, held_y, gY.token, rows, valid);
    };
    const auto put = [&](int n) {
      x.put(thread, held_x, own.x[n % kStages]);
      y.put(thread, held_y, own.y[n % kStages]);
    };

    for (int i = thread; i < kSpan; i += kGroupThreads) {
      *reinterpret_cast<uint4*>(own.ones.at(i, 0)) = make_uint4(one<Element>(), 0, 0, 0);
      if constexpr (Tr::kD > Tr::D) {
        for (int stage = 0; stage < kStages; ++stage) {
          *reinterpret_cast<uint4*>(own.x[stage].at(i, Tr::D / 8)) = make_uint4(0, 0, 0, 0);
        }
      }
    }
    fetch(0);
    put(0);
    StateSlice<Tr, 1> state;
    WeightedSums<Tr> sums(thread);
    state.clear();
    const float tokens = kGradient ? tokens_through_span(a, seg, head) : 0.0f;
    float gradient = 1;
    const auto scalars_of = [&](int first) {
      return span_scalars(thread, a, seg, place.tile, head, seg.begin + first, length - first);
    };
    float2 scalars = kGradient ? scalars_of(turn * kSpan) : float2{};
    for (int n = 0; (kIncrementGroups * n + turn) * kSpan < length; ++n) {
      const int first = (kIncrementGroups * n + turn) * kSpan;
      auto& sX = own.x[n % kStages];
      auto& sY = own.y[n % kStages];
      group_sync(turn + 1);
      fetch(n + 1);
      if constexpr (kGradient) {
        const float next = gradient_unit<Tr>(a, tokens + float(first));
        if (Tr::kHalf && next != gradient) {
          state.scale(next / gradient), sums.scale(next / gradient);
        }
        gradient = next;
        scale_span<Element>(thread, sY, own.delta, scalars, gradient);
        scalars = scalars_of(first + kIncrementGroups * kSpan);
      }
      store_features<Tr, kGroupThreads>(own.phi, sX, 0, thread);
      mma_publish();
      group_sync(turn + 1);
      mma_begin(state.sum);
      state.update(sY, own.phi, 0);
      mma_commit();
      if constexpr (kGradient) {
        sums.update(lane, sX, own.delta);
      } else {
        sums.Moments<Tr>::update(lane, sX, own.ones, 0);
      }
      put(n + 1);  // nobody reads chunk n - 1 any more
      mma_wait<0>(state.sum);
    }
    group_sync(turn + 1);
    state.scale(1 / gradient), sums.scale(1 / gradient);
    state.store(own.sums());
    float* sZ = own.sums() + Tr::kF * kTileV;
    for (int f = thread; f < Tr::kF; f += kGroupThreads) sZ[f] = 0;
    group_sync(turn + 1);
    if (!kGradient && turn == 0) sums.constant = float(length);  // of all three
    sums.for_all(lane, [&](int f, float& z) { sZ[f] = z; });
    __syncthreads();
    float4* to =
        reinterpret_cast<float4*>(a.workspace + place.index(a, place.slot) * kStateFloats<Tr>);
    for (int i = threadIdx.x; i < int(kStateFloats<Tr> / 4); i += kIncrementThreads) {
      float4 sum = reinterpret_cast<const float4*>(smem.group[0].sums())[i];
      for (int g = 1; g < kIncrementGroups; ++g) {
        const float4 other = reinterpret_cast<const float4*>(smem.group[g].sums())[i];
        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
      }
      to[i] = sum;
    }
  }
}

}  // namespace based::cuda::linear
