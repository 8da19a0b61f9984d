// dq of a segment (see gradients.cuh), and R and r of a segment, which dkv_kernel needs first.
#pragma once

#include "linear_attention/gradients.cuh"

namespace based::cuda::linear {

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) dq_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<BackwardSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists || seg.begin == seg.end) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v), length = int(seg.end - seg.begin);
  const int group = warpgroup_index(), warp = threadIdx.x / 32;
  Element* sScratch = smem.scratch[warp];

  prefetch_chunk(smem, a, seg, place, 0);
  prepare_tiles(smem);
  StateSlice<Tr> state;
  FeatureSums<Tr> sums;
  state.clear();
  const float* prefix = a.workspace + place.index(a, seg.border - 1) * kStateFloats<Tr>;
  if (!seg.first) state.load(prefix);
  if (a.initial.kv != nullptr) {
    state.add_public(a.initial, seg.sequence, head, first_v, valid, a.scale);
  }
  load_k_state<Tr>(smem.z, seg.first ? nullptr : prefix + Tr::kF * kTileV, a.initial, seg.sequence,
                   head, a.scale, 1.0f);

  for (int done = 0; done < length; done += kChunk) {
    const int stage = done / kChunk % Tr::kBackwardStages;
    auto &sQ = smem.q[stage], &sK = smem.k[stage];
    ValueTile &sV = smem.v[stage], &sU = smem.u[stage];
    const int64_t t = seg.begin + done;
    const int n = length - done;
    cp_async_wait<0>();
    __syncthreads();
    if (n < kChunk) store_ones<Element>(sV, n);
    if (Tr::kBackwardStages > 1 && n > kChunk) prefetch_chunk(smem, a, seg, place, done + kChunk);

    const float tokens = tokens_seen(a, seg, head, done);
    const float unit = operand_unit<Tr>(tokens), gradient = gradient_unit<Tr>(a, tokens);
    state.publish(smem.state, a.scale, unit);
    store_features<Tr>(smem.phi, sK, 0);
    sums.for_each([&](int f, float z) {
      const float value = (smem.z[f] + z) * feature_coefficient<Tr>(f, a.scale) * unit;
      store_row<Tr>(smem.state, kTileV, f, value);
      store_row<Tr>(smem.state, kTileV + 1, f, value);  // delta's second part reads it again
    });
    TokenRows<Tr> rows;
    rows.load(sQ, warp * 16, smem.transposed[warp]);
    mma_publish();
    __syncthreads();

    // u and, behind it, delta of the warpgroup's rows, as A fragments times `gradient`.
    uint32_t u[kGradientRows / 16][4];
    float delta[2];
    {
      float out[kExtended / 2];
      outputs<Tr>(out, rows, sK, sV, smem.state, a.scale, unit,
                  [&] { update_state<Tr>(state, sums, sV, smem.phi, sK); });
      mma_wait<0>(state.sum);
      __syncthreads();  // all products are done: phi is free
      if (any_not_finite(out)) {
        outputs_one_by_one<Tr>(out, rows, sK, sV, smem.state, a.scale, unit, sScratch);
      }
      read_gradients<Tr>(u, delta, out, sU, a, seg, place.tile, head, t, n, unit, gradient,
                         group * kRows);
    }

    float dq[Tr::D / 2] = {};
    const auto row_delta = [&](int, int e) { return delta[e / 2]; };
    static_for<0, kRows / kPairs>([&](auto part) {
      constexpr int kPart = decltype(part)::value;
      float scores[kPairs / 2], dw[kPairs / 2];
      uint32_t ds[kPairs / 16][4];
      const int first = group * kRows + kPart * kPairs;
      multiply_pairs<Tr>(scores, dw, rows, sK, u, sV, first);
      score_gradients<Tr, Visible::kLower, kPart>(ds, scores, dw, row_delta, a.scale, unit);
      float before[Tr::D / 2];
#pragma unroll
      for (int j = 0; j < Tr::D / 2; ++j) before[j] = dq[j];
      multiply_rows<Tr>(dq, ds, sK, first);
      if (any_not_finite(dq)) {
#pragma unroll
        for (int j = 0; j < Tr::D / 2; ++j) dq[j] = before[j];
        add_visible<Element, Tr::D, kPart>(dq, ds, sK, first, sScratch);
      }
    });
    if (group == 1) {  // the other warpgroup's tokens, all of them earlier
#pragma unroll 1
      for (int first = 0; first < kRows; first += kPairs) {
        float scores[kPairs / 2], dw[kPairs / 2];
        uint32_t ds[kPairs / 16][4];
        multiply_pairs<Tr>(scores, dw, rows, sK, u, sV, first);
        score_gradients<Tr, Visible::kAll, 0>(ds, scores, dw, row_delta, a.scale, unit);
        multiply_rows<Tr>(dq, ds, sK, first);
      }
    }
    add_state_gradient<Tr>(dq, u, smem.state, rows);
    store_gradient<Tr>(a.dq, a.partial_dq, a, seg, place.tile, head, t, n, dq,
                       1.0f / (unit * gradient), group * kRows);
    if (Tr::kBackwardStages == 1 && n > kChunk) {
      __syncthreads();
      prefetch_chunk(smem, a, seg, place, done + kChunk);
    }
  }
}

template <class Tr>
struct GradientIncrementSmem {
  alignas(128) PhiTile<Tr> phi;  // first: FeatureSums reads on behind it
  TokenTile<Tr> q[Tr::kIncrementStages];
  ValueTile u[Tr::kIncrementStages];
  float delta[kChunk];
};

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1)
    gradient_increment_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  constexpr int kStages = Tr::kIncrementStages;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<GradientIncrementSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_beside(a, place.slot, true);
  if (!seg.exists) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v) / 8, length = int(seg.end - seg.begin);
  const auto prefetch = [&](int done) {
    const int64_t t = seg.begin + done;
    const int n = length - done, stage = done / kChunk % kStages;
    if (n > 0) {
      load_tile<Tr::D / 8, Element>(smem.q[stage], a.q, seg.batch, t, n, head, 0, Tr::D / 8);
      load_tile<kTileV / 8, Element>(smem.u[stage], a.dout, seg.batch, t, n, head, first_v, valid);
    }
    cp_async_commit();
  };

  for (int i = 0; i < kStages; ++i) zero_padding<Tr>(smem.q[i]);
  for (int i = 0; i < kStages - 1; ++i) prefetch(i * kChunk);
  StateSlice<Tr> state;
  FeatureSums<Tr> sums;
  state.clear();
  float unit = 1;
  float2 scalars = load_scalars(a, seg, place.tile, head, seg.begin, length);
  for (int done = 0; done < length; done += kChunk) {
    const int stage = done / kChunk % kStages;
    const float next_unit = gradient_unit<Tr>(a, tokens_seen(a, seg, head, done));
    if (Tr::kHalf && next_unit != unit) {
      state.scale(next_unit / unit), sums.scale(next_unit / unit);
    }
    unit = next_unit;
    cp_async_wait<kStages - 2>();
    __syncthreads();
    prefetch(done + (kStages - 1) * kChunk);
    scale_gradients<Tr>(smem.u[stage], smem.delta, scalars, unit);
    scalars =
        load_scalars(a, seg, place.tile, head, seg.begin + done + kChunk, length - done - kChunk);
    store_features<Tr>(smem.phi, smem.q[stage], 0);
    mma_publish();
    __syncthreads();
    update_state<Tr>(state, sums, smem.u[stage], smem.phi, smem.q[stage]);
    mma_wait<0>(state.sum);
  }
  state.scale(1 / unit), sums.scale(1 / unit);
  float* workspace = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
  state.store(workspace);
  float* gZ = workspace + Tr::kF * kTileV;
  sums.for_each([&](int f, float value) { gZ[f] = value; });
}

}  // namespace based::cuda::linear
