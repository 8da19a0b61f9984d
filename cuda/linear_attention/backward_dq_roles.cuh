// The dq kernel of sm_90a for feature_dim up to 16: what backward_dq.cuh computes, by warpgroups
// with roles as in forward_roles.cuh.
#pragma once

#include "linear_attention/gradients.cuh"
#include "linear_attention/role_state.cuh"

namespace based::cuda::linear {

template <class Tr>
struct GradientStage {
  alignas(16) SpanTokens<Tr> q, k;
  SpanValues v, u;     // u: dout; dkv_roles_kernel scales it
  float delta[kSpan];  // dkv_roles_kernel's
};

template <class Tr>
struct GradientLoader {
  using Element = typename Tr::Element;
  SpanLoader<Element, Tr::D / 8> q, k;
  SpanLoader<Element, kTileV / 8> v, dout;

  __device__ GradientLoader(int thread, const Arguments& a, const Segment& seg, int head,
                            int first_v, int chunk)
      : q(thread, a.q, seg, head, 0, chunk),
        k(thread, a.k, seg, head, 0, chunk),
        v(thread, a.v, seg, head, first_v, chunk),
        dout(thread, a.dout, seg, head, first_v, chunk) {}

  // Of the chunk n rows exist, of v and dout `valid` times 8 columns.
  template <int kTurns>
  __device__ __forceinline__ void load(int thread, GradientStage<Tr>& stage, const Arguments& a,
                                       int n, int valid) {
    q.template load<kTurns>(thread, stage.q, a.q.token, n);
    k.template load<kTurns>(thread, stage.k, a.k.token, n);
    v.template load<kTurns>(thread, stage.v, a.v.token, n, valid);
    dout.template load<kTurns>(thread, stage.u, a.dout.token, n, valid);
  }
};

template <class Tr>
using DqRing = RoleRing<Tr, GradientStage<Tr>, 4, 2, kGradientRows, 1, 1>;

template <class Tr>
struct DqRoleSmem : DqRing<Tr> {
  typename Tr::Element scratch[8][16 * kPairs];  // of the NaN paths
};

// A warpgroup of gradients: chunks turn, turn + 2, ...
template <class Tr>
__device__ __forceinline__ void write_dq(DqRoleSmem<Tr>& smem, const Arguments& a,
                                         const Segment& seg, const Place& place, int chunks,
                                         float tokens_through_first, int turn) {
  using Element = typename Tr::Element;
  using Ring = DqRing<Tr>;
  constexpr int kSteps = Tr::kF / 16;
  const int head = place.head, first_v = place.tile * kTileV, length = int(seg.end - seg.begin);
  const int valid = min(kTileV, a.head_dim - first_v) / 8;
  const int thread = thread_index() % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const Diagonal diagonal{__shfl_sync(0xffffffffu, warp, 0), lane / 4 - lane % 4 * 2};
  GradientLoader<Tr> loader(thread, a, seg, head, first_v, turn);
  const auto load = [&](int i) {
    if (i >= chunks) return;
    loader.template load<2>(thread, smem.begin_load(i), a, length - i * kSpan, valid);
    smem.end_load(i);
  };
#pragma unroll 1
  for (int i = turn; i < Ring::kAhead; i += 2) load(i);

  Queries<Tr> rows(lane, smem.transposed[4 * turn + warp]);
  Element* sScratch = smem.scratch[4 * turn + warp];
#pragma unroll 1
  for (int i = turn; i < chunks; i += 2) {
    const auto& stage = smem.stage_of(i);
    const auto& sState = smem.state_of(i);
    const float tokens = tokens_through_first + float(i * kSpan);
    const float unit = operand_unit<Tr>(tokens), gradient = gradient_unit<Tr>(a, tokens);
    const int n = length - i * kSpan;
    smem.wait_loaded(i);
    mma_publish();  // the copies of others, for wgmma

    float scores[kPairs / 2], out[kExtended / 2];
    begin_results<Tr, Visible::kLower, kExtended>(out, scores, rows, thread, smem, i, stage.q,
                                                  stage.k, stage.v, a.scale, unit, diagonal);
    mma_wait<0>(out);
    if (any_not_finite(out)) {
      uint32_t w[kPairs / 16][4], phi[kSteps][4];
      weights<Tr, Visible::kLower, 0>(w, scores, a.scale, unit, diagonal);
      rows.features(lane, phi);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        mma_ABt<Element, kExtended, false>(out, phi[step], sState, 0, 2 * step, step > 0);
      }
      add_visible<Element, kExtended, 0>(out, w, stage.v, 0, sScratch);
    }

    // u and, behind it, delta of the rows, as A fragments times `gradient`.
    uint32_t u[kGradientRows / 16][4];
    float delta[2];
    read_gradients<Tr>(u, delta, out, stage.u, a, seg, place.tile, head, seg.begin + i * kSpan, n,
                       unit, gradient, 0);

    float dq[Tr::D / 2] = {};
    {
      float dw[kPairs / 2];
      uint32_t ds[kPairs / 16][4];
      mma_begin(dw);
#pragma unroll
      for (int j = 0; j < kTileV / 16; ++j) {
        mma_ABt<Element, kPairs>(dw, u[j], stage.v, 0, 2 * j, j > 0);
      }
      mma_commit();
      load(i + Ring::kAhead);
      mma_wait<0>(dw);
      score_gradients<Tr, Visible::kLower, 0>(
          ds, scores, dw, [&](int, int e) { return delta[e / 2]; }, a.scale, unit, diagonal);
      multiply_rows<Tr>(dq, ds, stage.k, 0);
      if (any_not_finite(dq)) {
#pragma unroll
        for (float& x : dq) x = 0;
        add_visible<Element, Tr::D, 0>(dq, ds, stage.k, 0, sScratch);
      }
    }
    add_state_gradient<Tr>(dq, u, sState, rows);
    smem.release_state(i);
    smem.release_stage(i);
    store_gradient<Tr>(a.dq, a.partial_dq, a, seg, place.tile, head, seg.begin + i * kSpan, n, dq,
                       1.0f / (unit * gradient), 0);
  }
}

template <class Tr>
__global__ void __launch_bounds__(kRoleThreads, 1)
    dq_roles_kernel(const __grid_constant__ Arguments a) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(128) char raw[];
    auto& smem = *reinterpret_cast<DqRoleSmem<Tr>*>(raw);
    const Place place(a);
    const Segment seg = segment_of(a, place.slot);
    if (!seg.exists || seg.begin == seg.end) return;
    const int chunks = (int(seg.end - seg.begin) + kSpan - 1) / kSpan;
    smem.prepare();
    const float tokens = tokens_through_span(a, seg, place.head);
    const int role = warpgroup_index();
    if (role == 0) {
      set_registers<kStateRegisters>();
      keep_state<Tr, 2>(smem, a, seg, place, chunks, tokens, State{});
    } else if (role == 1) {
      set_registers<kFeatureRegisters>();
      keep_features<Tr>(smem, chunks);
    } else {
      set_registers<kOutputRegisters>();
      write_dq<Tr>(smem, a, seg, place, chunks, tokens, role - 2);
    }
  }
}

}  // namespace based::cuda::linear
