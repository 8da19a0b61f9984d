// Causal linear attention, forward. A sequence is cut into segments; one CTA walks one segment of
// one (head, 64 columns of v), 128 tokens at a time:
//   out_t = (phi(q_t) S + sum_s w_ts v_s) / (phi(q_t) z + sum_s w_ts)   over s <= t in the chunk,
//   then S += phi(k)^T v, z += sum phi(k).
// Two warpgroups: each takes the outputs of 64 tokens and the state of one half of the features.
// With several segments, increment_kernel first leaves each segment's sum in the workspace and
// scan_kernel turns them into the sums before each border of two segments.
// Precision: S and z in fp32; every product has 16-bit operands (q, k, v, phi, w and copies of S
// and z rounded once) and fp32 sums. The denominator is one more column of v (ones) and of S (z),
// so that it adds the very weights that the numerator adds.
#pragma once

#include "linear_attention/increments.cuh"

namespace based::cuda::linear {

template <class Tr>
struct ForwardSmem {
  using StateTile = CoreTile<kExtended, Tr::kF>;
  alignas(128) TokenTile<Tr> q[2], k[2];
  ValueTile v[2];
  union {
    PhiTile<Tr> phi;
    CoreTile<kChunk, kTileV> out;
    typename Tr::Element scratch[kThreads / 32][16 * kPairs];  // of the NaN path
  };
  StateTile state;
  char transposed[kThreads / 32][TokenRows<Tr>::kTransposedBytes];
  float z[Tr::kF];
};

template <class Tr>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  using OutTile = CoreTile<kChunk, kTileV>;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<ForwardSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists) return;
  const int head = place.head, first_v = place.tile * kTileV, warp = threadIdx.x / 32;
  const int valid = min(kTileV, a.head_dim - first_v), length = int(seg.end - seg.begin);
  const auto prefetch = [&](int done) {
    const int64_t t = seg.begin + done;
    const int n = length - done, stage = done / kChunk % 2;
    load_tile<Tr::D / 8, Element>(smem.q[stage], a.q, seg.batch, t, n, head, 0, Tr::D / 8);
    load_tile<Tr::D / 8, Element>(smem.k[stage], a.k, seg.batch, t, n, head, 0, Tr::D / 8);
    load_tile<kTileV / 8, Element>(smem.v[stage], a.v, seg.batch, t, n, head, first_v, valid / 8);
    cp_async_commit();
  };

  if (length > 0) prefetch(0);
  for (int i = 0; i < 2; ++i) {
    zero_padding<Tr>(smem.q[i]), zero_padding<Tr>(smem.k[i]);
    store_ones<Element>(smem.v[i], length - i * kChunk);
  }
  for (int i = threadIdx.x; i < Tr::kGroups * 8; i += kThreads) {  // rows below z
    *reinterpret_cast<uint4*>(smem.state.at(kTileV + i % 8, i / 8)) = make_uint4(0, 0, 0, 0);
  }
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
    auto &sQ = smem.q[done / kChunk % 2], &sK = smem.k[done / kChunk % 2];
    ValueTile& sV = smem.v[done / kChunk % 2];
    cp_async_wait<0>();
    __syncthreads();
    if (done + kChunk < length) prefetch(done + kChunk);
    if (length - done < kChunk) store_ones<Element>(sV, length - done);
    const float unit = operand_unit<Tr>(tokens_seen(a, seg, head, done));
    state.publish(smem.state, a.scale, unit);
    store_features<Tr>(smem.phi, sK, 0);
    const auto publish_z = [&](int f, float z) {
      *reinterpret_cast<Element*>(smem.state.at(kTileV, f / 8) + f % 8 * 2) =
          from_float<Element>((smem.z[f] + z) * feature_coefficient<Tr>(f, a.scale) * unit);
    };
    sums.for_each(publish_z);
    TokenRows<Tr> rows;
    rows.load(sQ, warp * 16, smem.transposed[warp]);
    mma_publish();
    __syncthreads();

    float out[kExtended / 2];
    outputs<Tr>(out, rows, sK, sV, smem.state, a.scale, unit,
                [&] { update_state<Tr>(state, sums, sV, smem.phi, sK); });
    mma_wait<0>(state.sum);
    __syncthreads();  // all products are done: phi is free
    if (any_not_finite(out)) {
      outputs_one_by_one<Tr>(out, rows, sK, sV, smem.state, a.scale, unit, smem.scratch[warp]);
    }
    __syncthreads();  // nobody reads the tiles any more, nor the scratch
    OutTile& sOut = smem.out;
    const int quad = threadIdx.x % 32 / 4 * 4;  // its first lane has the denominators
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float den = __shfl_sync(0xffffffffu, out[kTileV / 2 + 2 * half], quad);
      const float inverse = 1.0f / (a.normalize ? den : unit);
      char* row = sOut.at(warp * 16 + acc_row(2 * half) % 16, 0) + threadIdx.x % 4 * 4;
#pragma unroll
      for (int b = 0; b < kTileV / 8; ++b) {
        *reinterpret_cast<uint32_t*>(row + b * OutTile::kColStride) =
            pack<Element>(out[4 * b + 2 * half] * inverse, out[4 * b + 2 * half + 1] * inverse);
      }
    }
    __syncwarp();
    store_strip<kTileV / 8, Element>(a.out, seg.batch, seg.begin + done, length - done, head,
                                     first_v, valid / 8, sOut, warp * 16);
  }

  if (seg.last && a.final.kv != nullptr) {
    state.store_public(a.final, seg.sequence, head, first_v, valid, a.scale, 1.0f);
    if (place.tile == 0) {
      float* gZ = a.final.k + seg.sequence * a.final.k_sequence + head * a.final.k_head;
      const auto store_z = [&](int f, float z) {
        gZ[public_row<Tr>(f)] = (smem.z[f] + z) * sqrtf(feature_coefficient<Tr>(f, a.scale));
      };
      __syncthreads();
      sums.for_each(store_z);
    }
  }
}

}  // namespace based::cuda::linear
