// The forward kernel of sm_90a for feature_dim up to 16: what forward.cuh computes, by warpgroups
// with roles (role_state.cuh).
#pragma once

#include "linear_attention/role_state.cuh"

namespace based::cuda::linear {

template <class Tr>
struct ForwardStage {
  alignas(16) SpanTokens<Tr> q, k;
  SpanValues v;
};

template <class Tr>
using ForwardRing = RoleRing<Tr, ForwardStage<Tr>, 6, 4, kExtended, 2, 1>;

template <class Tr>
struct ForwardRoleSmem : ForwardRing<Tr> {
  CoreTile<kSpan, kTileV> out[2];
  typename Tr::Element scratch[8][16 * kPairs];  // of the NaN path
};

// Whether a pair of 16-bit elements has one that is NaN or infinite.
template <class Element, int N>
__device__ __forceinline__ bool any_not_finite(const uint32_t (&words)[N]) {
  uint32_t zero = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) zero = multiply_add<Element>(words[i], 0, zero);
  return __any_sync(0xffffffffu, (zero & 0x7fff7fffu) != 0);
}

// A warpgroup of outputs: chunks turn, turn + 2, ...
template <class Tr>
__device__ __forceinline__ void write_outputs(ForwardRoleSmem<Tr>& smem, const Arguments& a,
                                              const Segment& seg, const Place& place, int chunks,
                                              float tokens, int turn) {
  using Element = typename Tr::Element;
  using Ring = ForwardRing<Tr>;
  constexpr int kSteps = Tr::kF / 16;
  const int head = place.head, first_v = place.tile * kTileV, length = int(seg.end - seg.begin);
  const int valid = min(kTileV, a.head_dim - first_v) / 8;
  const int thread = thread_index() % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const Diagonal diagonal{__shfl_sync(0xffffffffu, warp, 0), lane / 4 - lane % 4 * 2};
  SpanLoader<Element, Tr::D / 8> q(thread, a.q, seg, head, 0, turn);
  SpanLoader<Element, Tr::D / 8> k(thread, a.k, seg, head, 0, turn);
  SpanLoader<Element, kTileV / 8> v(thread, a.v, seg, head, first_v, turn);
  const auto load = [&](int i) {
    if (i >= chunks) return;
    auto& stage = smem.begin_load(i);
    const int n = length - i * kSpan;
    q.template load<2>(thread, stage.q, a.q.token, n);
    k.template load<2>(thread, stage.k, a.k.token, n);
    smem.end_load(i);
  };
  uint4 held[decltype(v)::kPasses];  // of v of the warpgroup's next chunk
  const auto fetch = [&](int i) {
    v.template fetch<2>(thread, held, a.v.token, length - i * kSpan, valid);
  };
  const auto put = [&](int i) {
    v.put(thread, held, smem.stage_of(i).v);
    mma_publish();
    smem.end_store(i);
  };
  if (turn < chunks) fetch(turn);
#pragma unroll 1
  for (int i = turn; i < Ring::kAhead; i += 2) load(i);
  if (turn < chunks) put(turn);

  Queries<Tr> rows(lane, smem.transposed[4 * turn + warp]);
  SpanStore<Element> store(thread, a.out, seg, head, first_v, turn);
#pragma unroll 1
  for (int i = turn; i < chunks; i += 2) {
    const auto& stage = smem.stage_of(i);
    const auto& sState = smem.state_of(i);
    const float unit = operand_unit<Tr>(tokens + float(i * kSpan));
    if (i + 2 < chunks) fetch(i + 2);
    smem.wait_loaded(i);
    mma_publish();  // the copies of others, for wgmma

    float out[kExtended / 2];
    {
      float scores[kPairs / 2];
      begin_results<Tr, Visible::kLower, kExtended>(out, scores, rows, thread, smem, i, stage.q,
                                                    stage.k, stage.v, a.scale, unit, diagonal);
      load(i + Ring::kAhead);
      mma_wait<0>(out);
    }

    uint32_t words[kTileV / 4];
    const auto normalize = [&] {
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // the first lane of four has the denominators
        const float den = __shfl_sync(0xffffffffu, out[kTileV / 2 + 2 * half], lane & ~3);
        inverse[half] = __fdividef(1.0f, a.normalize ? den : unit);
      }
#pragma unroll
      for (int j = 0; j < kTileV / 4; ++j) {
        words[j] = pack<Element>(out[2 * j] * inverse[j % 2], out[2 * j + 1] * inverse[j % 2]);
      }
    };
    normalize();
    if (any_not_finite<Element>(words)) {
      float scores[kPairs / 2];
      mma_ABt<Element, kPairs, false>(scores, rows.x[0], stage.k, 0, 0, false);
      uint32_t w[kPairs / 16][4], phi[kSteps][4];
      weights<Tr, Visible::kLower, 0>(w, scores, a.scale, unit, diagonal);
      rows.features(lane, phi);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        mma_ABt<Element, kExtended, false>(out, phi[step], sState, 0, 2 * step, step > 0);
      }
      add_visible<Element, kExtended, 0>(out, w, stage.v, 0, smem.scratch[4 * turn + warp]);
      __syncwarp();
      normalize();
    }
    smem.release_state(i);
    smem.release_stage(i);

    if (i + 2 < chunks) put(i + 2);
    store.template store<2>(thread, words, smem.out[turn], a.out.token, length - i * kSpan, valid);
  }
}

template <class Tr>
__global__ void __launch_bounds__(kRoleThreads, 1)
    forward_roles_kernel(const __grid_constant__ Arguments a) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(128) char raw[];
    auto& smem = *reinterpret_cast<ForwardRoleSmem<Tr>*>(raw);
    const Place place(a);
    const Segment seg = segment_of(a, place.slot);
    if (!seg.exists) return;
    const int chunks = (int(seg.end - seg.begin) + kSpan - 1) / kSpan;
    const float tokens = tokens_through_span(a, seg, place.head);
    smem.prepare();
    const int role = warpgroup_index();
    if (role == 0) {
      set_registers<kStateRegisters>();
      keep_state<Tr, 1>(smem, a, seg, place, chunks, tokens, seg.last ? a.final : State{});
    } else if (role == 1) {
      set_registers<kFeatureRegisters>();
      keep_features<Tr>(smem, chunks);
    } else {
      set_registers<kOutputRegisters>();
      write_outputs<Tr>(smem, a, seg, place, chunks, tokens, role - 2);
    }
  }
}

}  // namespace based::cuda::linear
