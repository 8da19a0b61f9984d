// The dkv kernel of sm_90a for feature_dim up to 16: what backward_dkv.cuh computes, by warpgroups
// with roles as in role_state.cuh, from the segment's last chunk to its first: step i is chunk
// chunks - 1 - i. The warpgroup of features also makes u of dout, and keeps r.
#pragma once

#include "linear_attention/backward_dq_roles.cuh"
#include "linear_attention/role_gradients.cuh"

namespace based::cuda::linear {

template <class Tr>
using DkvRing = RoleRing<Tr, GradientStage<Tr>, 4, 2, kGradientRows, 1, 2>;

template <class Tr>
struct DkvRoleSmem : DkvRing<Tr> {
  CoreTile<kSpan, kTileV> dv[2];
};

struct NoSums {
  template <class StateTile>
  __device__ __forceinline__ void publish(StateTile&, int, float) {}
  template <class Stage>
  __device__ __forceinline__ void update(const Stage&) {}
};

// The warpgroup of R. `tokens`: those seen at the end of the segment's first chunk.
template <class Tr>
__device__ __forceinline__ void keep_suffix(DkvRoleSmem<Tr>& smem, const Arguments& a,
                                            const Segment& seg, const Place& place, int chunks,
                                            float tokens) {
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v);
  StateSlice<Tr, 1> state;
  state.clear();
  if (!seg.last) state.load(a.workspace + place.index(a, seg.border) * kStateFloats<Tr>);
  if (a.final.kv != nullptr) {
    state.add_public(a.final, seg.sequence, head, first_v, valid, a.scale);
  }
  float gradient = 1;
  NoSums none;  // r is another warpgroup's
  walk_state<Tr>(
      smem, state, chunks, a.scale,
      [&](int i) {
        const float seen = tokens + float((chunks - 1 - i) * kSpan);
        const float next = gradient_unit<Tr>(a, seen);
        if (Tr::kHalf && next != gradient) state.scale(next / gradient);
        gradient = next;
        return operand_unit<Tr>(seen);
      },
      [](const auto& stage) -> const auto& { return stage.u; }, none);
  if (seg.first && a.dinitial.kv != nullptr) {
    state.store_public(a.dinitial, seg.sequence, head, first_v, valid, a.scale, 1 / gradient);
  }
}

// The warpgroup of the queries' features, of u, and of r, which it leaves in two parts below R.
template <class Tr>
__device__ __forceinline__ void keep_query_features(DkvRoleSmem<Tr>& smem, const Arguments& a,
                                                    const Segment& seg, const Place& place,
                                                    int chunks, float tokens) {
  using Element = typename Tr::Element;
  const int head = place.head, thread = thread_index() % kGroupThreads, lane = thread % 32;
  const int length = int(seg.end - seg.begin);
  WeightedSums<Tr> sums(thread);
  if (!seg.last) {
    const float* r = a.workspace + place.index(a, seg.border) * kStateFloats<Tr> + Tr::kF * kTileV;
    sums.for_all(lane, [&](int f, float& sum) { sum = r[f]; });
  }
  // Each tile of V adds its share of r to dk; the gradient of the final k_state goes with the
  // first.
  if (a.final.kv != nullptr && place.tile == 0) {
    const float* gR = a.final.k + seg.sequence * a.final.k_sequence + head * a.final.k_head;
    sums.for_all(lane, [&](int f, float& sum) {
      sum += gR[public_row<Tr>(f)] * rsqrtf(feature_coefficient<Tr>(f, a.scale));
    });
  }
  const auto scalars_of = [&](int i) {
    const int first = (chunks - 1 - i) * kSpan;
    return span_scalars(thread, a, seg, place.tile, head, seg.begin + first, length - first);
  };
  float2 scalars = chunks > 0 ? scalars_of(0) : float2{};
  float gradient = 1;
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    auto& stage = smem.stage_of(i);
    const float seen = tokens + float((chunks - 1 - i) * kSpan);
    const float unit = operand_unit<Tr>(seen), next = gradient_unit<Tr>(a, seen);
    if (Tr::kHalf && next != gradient) sums.scale(next / gradient);
    gradient = next;
    smem.wait_loaded(i);
    scale_span<Element>(thread, stage.u, stage.delta, scalars, gradient);
    if (i + 1 < chunks) scalars = scalars_of(i + 1);
    store_features<Tr, kGroupThreads>(smem.begin_phi(i), stage.q, 0, thread);
    mma_publish();
    smem.end_phi(i);

    auto& sState = smem.begin_state(i);
    sums.for_all(lane, [&](int f, float r) {
      const float value = r * (feature_coefficient<Tr>(f, a.scale) * unit);
      const float high = to_float(from_float<Element>(value));
      store_row<Tr>(sState, kTileV, f, high);
      store_row<Tr>(sState, kTileV + 1, f, value - high);
    });
    mma_publish();
    smem.end_state(i);
    group_sync(1);  // all of delta is there
    sums.update(lane, stage.q, stage.delta);
    smem.release_stage(i);
  }
  if (seg.first && a.dinitial.kv != nullptr) {
    float* gR =
        a.partial_r + ((seg.sequence * a.heads + head) * a.tiles + place.tile) * int64_t(Tr::kF);
    sums.for_all(lane, [&](int f, float r) {
      gR[public_row<Tr>(f)] = r / gradient * sqrtf(feature_coefficient<Tr>(f, a.scale));
    });
  }
}

// A warpgroup of gradients: steps turn, turn + 2, ...
template <class Tr>
__device__ __forceinline__ void write_dkv(DkvRoleSmem<Tr>& smem, const Arguments& a,
                                          const Segment& seg, const Place& place, int chunks,
                                          float tokens, int turn) {
  using Element = typename Tr::Element;
  using Ring = DkvRing<Tr>;
  const int head = place.head, first_v = place.tile * kTileV, length = int(seg.end - seg.begin);
  const int valid = min(kTileV, a.head_dim - first_v) / 8, first = chunks - 1 - turn;
  const int thread = thread_index() % kGroupThreads, warp = thread / 32, lane = thread % 32;
  const Diagonal diagonal{__shfl_sync(0xffffffffu, warp, 0), lane / 4 - lane % 4 * 2};
  GradientLoader<Tr> loader(thread, a, seg, head, first_v, first);
  const auto load = [&](int i) {
    if (i >= chunks) return;
    loader.template load<-2>(thread, smem.begin_load(i), a, length - (chunks - 1 - i) * kSpan,
                             valid);
    smem.end_load(i);
  };
#pragma unroll 1
  for (int i = turn; i < Ring::kAhead; i += 2) load(i);

  Queries<Tr> rows(lane, smem.transposed[4 * turn + warp]);  // of keys
  SpanStore<Element> store(thread, a.dv, seg, head, first_v, first);
#pragma unroll 1
  for (int i = turn; i < chunks; i += 2) {
    const auto& stage = smem.stage_of(i);
    const auto& sState = smem.state_of(i);
    const int done = (chunks - 1 - i) * kSpan;
    const float seen = tokens + float(done);
    const float unit = operand_unit<Tr>(seen), factor = 1.0f / (unit * gradient_unit<Tr>(a, seen));
    smem.wait_loaded(i);
    mma_publish();  // the copies of others, for wgmma

    float scores[kPairs / 2];
    {
      float dv[kTileV / 2];
      begin_results<Tr, Visible::kUpper, kTileV>(dv, scores, rows, thread, smem, i, stage.k,
                                                 stage.q, stage.u, a.scale, unit, diagonal);
      load(i + Ring::kAhead);
      mma_wait<0>(dv);
      uint32_t words[kTileV / 4];
#pragma unroll
      for (int j = 0; j < kTileV / 4; ++j) {
        words[j] = pack<Element>(dv[2 * j] * factor, dv[2 * j + 1] * factor);
      }
      store.template store<-2>(thread, words, smem.dv[turn], a.dv.token, length - done, valid);
    }

    // y = v and, for r in two parts, two ones.
    uint32_t y[kGradientRows / 16][4];
#pragma unroll
    for (int j = 0; j < kTileV / 16; ++j) load_a(y[j], stage.v, warp * 16, 2 * j);
    y[kTileV / 16][0] = y[kTileV / 16][1] = lane % 4 == 0 ? one<Element>() * 0x10001u : 0;
    y[kTileV / 16][2] = y[kTileV / 16][3] = 0;
    float dk[Tr::D / 2] = {};
    {
      float dw[kPairs / 2];
      uint32_t ds[kPairs / 16][4];
      mma_begin(dw);
#pragma unroll
      for (int j = 0; j < kTileV / 16; ++j) {
        mma_ABt<Element, kPairs>(dw, y[j], stage.u, 0, 2 * j, j > 0);
      }
      mma_commit();
      mma_wait<0>(dw);
      const float* delta = stage.delta + lane % 4 * 2;
      score_gradients<Tr, Visible::kUpper, 0>(
          ds, scores, dw, [&](int j, int e) { return delta[8 * j + e % 2]; }, a.scale, unit,
          diagonal);
      multiply_rows<Tr>(dk, ds, stage.q, 0);
    }
    add_state_gradient<Tr>(dk, y, sState, rows);
    smem.release_state(i);
    smem.release_stage(i);
    store_gradient<Tr>(a.dk, a.partial_dk, a, seg, place.tile, head, seg.begin + done,
                       length - done, dk, factor, 0);
  }
}

template <class Tr>
__global__ void __launch_bounds__(kRoleThreads, 1)
    dkv_roles_kernel(const __grid_constant__ Arguments a) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(128) char raw[];
    auto& smem = *reinterpret_cast<DkvRoleSmem<Tr>*>(raw);
    const Place place(a);
    const Segment seg = segment_of(a, place.slot);
    if (!seg.exists) return;
    const int chunks = (int(seg.end - seg.begin) + kSpan - 1) / kSpan;
    const float tokens = tokens_through_span(a, seg, place.head);
    smem.prepare();
    const int role = warpgroup_index();
    if (role == 0) {
      set_registers<kStateRegisters>();
      keep_suffix<Tr>(smem, a, seg, place, chunks, tokens);
    } else if (role == 1) {
      set_registers<72>();
      keep_query_features<Tr>(smem, a, seg, place, chunks, tokens);
    } else {
      set_registers<160>();
      write_dkv<Tr>(smem, a, seg, place, chunks, tokens, role - 2);
    }
  }
}

}  // namespace based::cuda::linear
