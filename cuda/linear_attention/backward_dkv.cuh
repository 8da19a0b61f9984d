// dk and dv of a segment, walked from its end (see gradients.cuh).
#pragma once

#include "linear_attention/gradients.cuh"

namespace based::cuda::linear {

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) dkv_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<BackwardSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v), length = int(seg.end - seg.begin);
  const int group = warpgroup_index(), warp = threadIdx.x / 32;
  const int last = length > 0 ? (length - 1) / kChunk * kChunk : 0;

  if (length > 0) prefetch_chunk(smem, a, seg, place, last);
  prepare_tiles(smem);
  float unit_u = gradient_unit<Tr>(a, tokens_seen(a, seg, head, last));
  StateSlice<Tr> state;
  FeatureSums<Tr> sums;
  state.clear();
  const float* suffix = a.workspace + place.index(a, seg.border) * kStateFloats<Tr>;
  if (!seg.last) state.load(suffix);
  if (a.final.kv != nullptr) {
    state.add_public(a.final, seg.sequence, head, first_v, valid, a.scale);
  }
  state.scale(unit_u);
  // Each tile of V adds its share of r to dk; the gradient of the final k_state goes with the
  // first.
  load_k_state<Tr>(smem.z, seg.last ? nullptr : suffix + Tr::kF * kTileV,
                   place.tile == 0 ? a.final : State{}, seg.sequence, head, a.scale, unit_u);

  float2 scalars = load_scalars(a, seg, place.tile, head, seg.begin + last, length - last);
  for (int done = last; done >= 0 && length > 0; done -= kChunk) {
    const int stage = done / kChunk % Tr::kBackwardStages;
    auto &sQ = smem.q[stage], &sK = smem.k[stage];
    ValueTile &sV = smem.v[stage], &sU = smem.u[stage];
    const int64_t t = seg.begin + done;
    const int n = length - done;
    const float tokens = tokens_seen(a, seg, head, done);
    const float unit = operand_unit<Tr>(tokens), gradient = gradient_unit<Tr>(a, tokens);
    cp_async_wait<0>();
    __syncthreads();
    if (Tr::kBackwardStages > 1 && done > 0) prefetch_chunk(smem, a, seg, place, done - kChunk);
    if (Tr::kHalf && gradient != unit_u) {
      const float factor = gradient / unit_u;
      state.scale(factor), sums.scale(factor);
      for (int f = threadIdx.x; f < Tr::kF; f += kThreads) smem.z[f] *= factor;
      unit_u = gradient;
      __syncthreads();
    }
    scale_gradients<Tr>(sU, smem.delta, scalars, gradient);
    if (done > 0) scalars = load_scalars(a, seg, place.tile, head, t - kChunk, kChunk);
    store_features<Tr>(smem.phi, sQ, 0);
    state.publish(smem.state, a.scale, unit);
    sums.for_each([&](int f, float r) {
      const float value = (smem.z[f] + r) * feature_coefficient<Tr>(f, a.scale) * unit;
      const float high = to_float(from_float<Element>(value));
      store_row<Tr>(smem.state, kTileV, f, high);
      store_row<Tr>(smem.state, kTileV + 1, f, value - high);
    });
    TokenRows<Tr> rows;
    rows.load(sK, warp * 16, smem.transposed[warp]);
    mma_publish();
    __syncthreads();

    // dv, rows are keys; the queries that see all of warpgroup 0's keys are the other's.
    float dv[kTileV / 2];
#pragma unroll
    for (float& x : dv) x = 0;
    const auto add_values = [&](auto visible, auto part, int first) {
      float scores[kPairs / 2];
      uint32_t w[kPairs / 16][4];
      mma_begin(scores);
      multiply_scores<Tr>(scores, rows, sQ, first);
      mma_commit();
      mma_wait<0>(scores, dv);
      weights<Tr, decltype(visible)::value, decltype(part)::value>(w, scores, a.scale, unit);
      mma_begin(dv);
#pragma unroll
      for (int k = 0; k < kPairs / 16; ++k) {
        mma_AB<Element, kTileV>(dv, w[k], sU, first + 16 * k, 0);
      }
      mma_commit();
    };
    constexpr std::integral_constant<Visible, Visible::kAll> kAll{};
    constexpr std::integral_constant<Visible, Visible::kUpper> kUpper{};
    if (group == 0) {
#pragma unroll 1
      for (int first = kRows; first < kChunk; first += kPairs) {
        add_values(kAll, std::integral_constant<int, 0>{}, first);
      }
      mma_wait<0>(dv);
    }
    static_for<0, kRows / kPairs>([&](auto part) {
      add_values(kUpper, part, group * kRows + decltype(part)::value * kPairs);
    });
    update_state<Tr>(state, sums, sU, smem.phi, sQ);
    read_state<Tr, kTileV>(dv, rows, smem.state, true);
    mma_commit();
    mma_wait<0>(state.sum, dv);

    // y = v and, for r in two parts, two ones. Then the rows of v make room for those of dv.
    uint32_t y[kGradientRows / 16][4];
#pragma unroll
    for (int k = 0; k < kTileV / 16; ++k) load_a(y[k], sV, warp * 16, 2 * k);
    y[kTileV / 16][0] = y[kTileV / 16][1] = threadIdx.x % 4 == 0 ? one<Element>() * 0x10001u : 0;
    y[kTileV / 16][2] = y[kTileV / 16][3] = 0;
    __syncwarp();
    const float factor = 1.0f / (unit * gradient);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      char* row = sV.at(group * kRows + acc_row(2 * half), 0) + threadIdx.x % 4 * 4;
#pragma unroll
      for (int b = 0; b < kTileV / 8; ++b) {
        *reinterpret_cast<uint32_t*>(row + b * ValueTile::kColStride) =
            pack<Element>(dv[4 * b + 2 * half] * factor, dv[4 * b + 2 * half + 1] * factor);
      }
    }
    __syncwarp();
    store_strip<kTileV / 8, Element>(a.dv, seg.batch, t, n, head, first_v, valid / 8, sV,
                                     warp * 16);

    float dk[Tr::D / 2] = {};
    const auto add_keys = [&](auto visible, auto part, int first) {
      float scores[kPairs / 2], dw[kPairs / 2];
      uint32_t ds[kPairs / 16][4];
      multiply_pairs<Tr>(scores, dw, rows, sQ, y, sU, first);
      const float* delta = smem.delta + first;
      score_gradients<Tr, decltype(visible)::value, decltype(part)::value>(
          ds, scores, dw, [&](int i, int e) { return delta[8 * i + acc_column(e)]; }, a.scale,
          unit);
      multiply_rows<Tr>(dk, ds, sQ, first);
    };
    if (group == 0) {
#pragma unroll 1
      for (int first = kRows; first < kChunk; first += kPairs) {
        add_keys(kAll, std::integral_constant<int, 0>{}, first);
      }
    }
    static_for<0, kRows / kPairs>(
        [&](auto part) { add_keys(kUpper, part, group * kRows + decltype(part)::value * kPairs); });
    add_state_gradient<Tr>(dk, y, smem.state, rows);
    store_gradient<Tr>(a.dk, a.partial_dk, a, seg, place.tile, head, t, n, dk, factor,
                       group * kRows);
    if (Tr::kBackwardStages == 1 && done > 0) {
      __syncthreads();
      prefetch_chunk(smem, a, seg, place, done - kChunk);
    }
  }

  if (seg.first && a.dinitial.kv != nullptr) {
    state.store_public(a.dinitial, seg.sequence, head, first_v, valid, a.scale, 1 / unit_u);
    float* gR = a.partial_r + (seg.sequence * a.heads + head) * a.tiles * int64_t(Tr::kF) +
                place.tile * Tr::kF;
    __syncthreads();
    sums.for_each([&](int f, float r) {
      gR[public_row<Tr>(f)] = (smem.z[f] + r) / unit_u * sqrtf(feature_coefficient<Tr>(f, a.scale));
    });
  }
}

}  // namespace based::cuda::linear
