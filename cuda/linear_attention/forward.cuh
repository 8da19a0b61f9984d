// Causal linear attention, forward. A sequence is cut into segments; one CTA walks one segment of
// one (head, 64 columns of v), 64 tokens at a time:
//   out_t = (phi(q_t) S + sum_s w_ts v_s) / (phi(q_t) z + sum_s w_ts)   over s <= t in the chunk,
//   then S += phi(k)^T v, z += sum phi(k).
// With several segments, increment_kernel first leaves each segment's sum in the workspace and
// scan_kernel turns them into the sums before each segment.
// Precision: S and z in fp32; every product has 16-bit operands (q, k, v, phi, w and copies of S
// and z rounded once) and fp32 sums. The denominator is one more column of v (ones) and of S (z),
// so that it adds the very weights that the numerator adds.
#pragma once

#include "linear_attention/state.cuh"

namespace based::cuda::linear {

template <class Tr>
using TokenTile = CoreTile<kChunk, Tr::kD>;
using ValueTile = CoreTile<kChunk, kExtended>;
template <class Tr>
using PhiTile = CoreTile<kChunk, Tr::kF>;

// Floats of one state in the workspace: S^T in the registers' order, then z.
template <class Tr>
constexpr int64_t kStateFloats = Tr::kF * (kTileV + 1);

// Zeroes the columns of q and k tiles that pad D to a multiple of 16.
template <class Tr, class Tile>
__device__ __forceinline__ void zero_padding(Tile& tile) {
  if constexpr (Tr::kD > Tr::D) {
    for (int row = threadIdx.x; row < kChunk; row += Tr::kThreads) {
      *reinterpret_cast<uint4*>(tile.at(row, Tr::D / 8)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// ---- sums of a segment -------------------------------------------------------------------------

template <class Tr>
struct IncrementSmem {
  alignas(128) TokenTile<Tr> k[2];
  ValueTile v[2];
  PhiTile<Tr> phi;
};

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kForwardCtas)
    increment_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<IncrementSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists || seg.last) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v) / 8;
  const int chunks = int((seg.end - seg.begin + kChunk - 1) / kChunk);
  const auto prefetch = [&](int i) {
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    load_tile<Tr::kThreads, Element>(smem.k[i % 2], a.k, seg.batch, t, n, head, 0, Tr::D / 8,
                                     Tr::D / 8);
    load_tile<Tr::kThreads, Element>(smem.v[i % 2], a.v, seg.batch, t, n, head, first_v, kTileV / 8,
                                     valid);
    cp_async_commit();
  };

  prefetch(0);
  zero_padding<Tr>(smem.k[0]), zero_padding<Tr>(smem.k[1]);
  StateSlice<Tr> state;
  Moments<Tr> moments;
  state.clear();
  for (int i = 0; i < chunks; ++i) {
    cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < chunks) prefetch(i + 1);
    store_features<Tr>(smem.phi, smem.k[i % 2]);
    mma_publish();
    __syncthreads();
    mma_begin(state.sum);
    state.update(smem.v[i % 2], smem.phi);
    mma_commit();
    moments.template update<false>(smem.k[i % 2], nullptr);
    mma_wait<0>(state.sum);
  }
  float* workspace = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
  state.store(workspace);
  float* gZ = workspace + Tr::kF * kTileV;
  moments.for_each([&](int f, float value) { gZ[f] = value; });
  if (threadIdx.x == 0) gZ[Tr::kConstant] = float(seg.end - seg.begin);
}

// Each segment's sum becomes the sum of the segments before it (kReverse: after it) in its
// sequence. One thread per element of a state and (sequence, head, tile).
template <bool kReverse>
__global__ void __launch_bounds__(256)
    scan_kernel(const __grid_constant__ Arguments a, int64_t state_floats, int blocks_per_state) {
  const int64_t index = blockIdx.x / blocks_per_state;
  const int64_t element = int64_t(blockIdx.x % blocks_per_state) * 256 + threadIdx.x;
  if (element >= state_floats) return;
  const int64_t per_slot = int64_t(a.heads) * a.tiles;
  const int64_t sequence = index / per_slot, row = index % per_slot;
  const Segment all = sequence_of(a, sequence);
  const int64_t count = max(int64_t(1), (all.end - all.begin + a.segment - 1) / a.segment);
  const int64_t first = first_slot(a, sequence), stride = per_slot * state_floats;
  float* at = a.workspace + (first * per_slot + row) * state_floats + element;
  if (kReverse) at += (count - 1) * stride;
  float sum = 0;
  for (int64_t s = 0; s < count; ++s, at += kReverse ? -stride : stride) {
    const float own = s + 1 < count ? *at : 0.0f;  // the last one's sum is never needed
    *at = sum;
    sum += own;
  }
}

// ---- outputs of a segment ----------------------------------------------------------------------

template <class Tr>
struct ForwardSmem {
  using StateTile = CoreTile<kExtended, Tr::kF>;
  alignas(128) TokenTile<Tr> q[2], k[2];
  ValueTile v[2];
  PhiTile<Tr> phi;  // also: partial outputs of slices, weights of the NaN path
  StateTile state;
  char transposed[Tr::kThreads / 32][TokenRows<Tr>::kTransposedBytes];
  float z[Tr::kF];
};

// out (64, N) (+)= phi S over this slice of the features.
template <class Tr, int N, bool kAsync = kHasWgmma, class StateTile>
__device__ __forceinline__ void read_state(float (&out)[N / 2], const TokenRows<Tr>& rows,
                                           const StateTile& sState, bool accumulate) {
  static_for<0, Tr::kSlices>([&](auto slice) {
    if (StateSlice<Tr>::slice() != decltype(slice)::value) return;
    constexpr int kFirst = decltype(slice)::value * Tr::kSliceF / 16;
    static_for<kFirst, kFirst + Tr::kSliceF / 16>([&](auto step) {
      uint32_t phi[4];
      rows.template features<decltype(step)::value>(phi);
      mma_ABt<typename Tr::Element, N, kAsync>(out, phi, sState, 0, 2 * decltype(step)::value,
                                               accumulate || decltype(step)::value > kFirst);
    });
  });
}

// Adds the slices' partial sums (64, N) into warpgroup 0's; `scratch` holds kSlices - 1 of them.
template <class Tr, int N>
__device__ __forceinline__ void add_slices(float (&sum)[N], float* scratch) {
  if constexpr (Tr::kSlices > 1) {
    const int slice = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarpgroup;
    __syncthreads();
    if (slice > 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) scratch[((slice - 1) * N + i) * kWarpgroup + lane] = sum[i];
    }
    __syncthreads();
    if (slice == 0) {
      for (int s = 0; s < Tr::kSlices - 1; ++s) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += scratch[(s * N + i) * kWarpgroup + lane];
      }
    }
  }
}

// scores (64 queries, 64 keys) of one warpgroup = q k^T
template <class Tr, bool kAsync = kHasWgmma, class Tile>
__device__ __forceinline__ void multiply_scores(float (&scores)[kChunk / 2],
                                                const TokenRows<Tr>& rows, const Tile& other) {
#pragma unroll
  for (int i = 0; i < Tr::kD / 16; ++i) {
    mma_ABt<typename Tr::Element, kChunk, kAsync>(scores, rows.x[i], other, 0, 2 * i, i > 0);
  }
}

// The accumulator element (i, e) of a (64, 64) score tile is row t, column s.
__device__ __forceinline__ int score_row(int e) {
  return threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
}
__device__ __forceinline__ int score_column(int i, int e) {
  return 8 * i + threadIdx.x % 4 * 2 + e % 2;
}

// w = 1 + s + s^2/2 on and below the diagonal (kUpper: on and above), times unit, as A fragments.
template <class Tr, bool kUpper>
__device__ __forceinline__ void weights(uint32_t (&w)[kChunk / 16][4],
                                        const float (&scores)[kChunk / 2], float scale,
                                        float unit) {
  const float a = 0.5f * scale * scale * unit, b = scale * unit;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i) {
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float s = scores[4 * i + e];
      const bool visible =
          kUpper ? score_column(i, e) >= score_row(e) : score_column(i, e) <= score_row(e);
      value[e] = visible ? fmaf(s, fmaf(s, a, b), unit) : 0.0f;
    }
    w[i / 2][i % 2 * 2] = pack<typename Tr::Element>(value[0], value[1]);
    w[i / 2][i % 2 * 2 + 1] = pack<typename Tr::Element>(value[2], value[3]);
  }
}

// The diagonal tile once more for NaN or infinity among its values: a product would carry 0 * NaN
// of a later token into earlier rows. out += sum over s <= t of w_ts v_s, one by one.
template <class Tr>
__device__ __forceinline__ void add_visible_values(float (&out)[kExtended / 2],
                                                   const uint32_t (&w)[kChunk / 16][4],
                                                   const ValueTile& sV,
                                                   CoreTile<kChunk, kChunk>& sW) {
  using Element = typename Tr::Element;
  const int c4 = threadIdx.x % 4 * 4;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i) {
    *reinterpret_cast<uint32_t*>(sW.at(score_row(0), i) + c4) = w[i / 2][i % 2 * 2];
    *reinterpret_cast<uint32_t*>(sW.at(score_row(2), i) + c4) = w[i / 2][i % 2 * 2 + 1];
  }
  __syncwarp();
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int t = score_row(2 * half);
#pragma unroll 1
    for (int s = 0; s <= t; ++s) {
      const float weight = to_float(*reinterpret_cast<const Element*>(sW.at(t, s / 8) + s % 8 * 2));
#pragma unroll
      for (int i = 0; i < kExtended / 8; ++i) {
        const float2 v = unpack<Element>(*reinterpret_cast<const uint32_t*>(sV.at(s, i) + c4));
        if (half == 0) out[4 * i] += weight * v.x, out[4 * i + 1] += weight * v.y;
        if (half == 1) out[4 * i + 2] += weight * v.x, out[4 * i + 3] += weight * v.y;
      }
    }
  }
}

template <int N>
__device__ __forceinline__ bool any_not_finite(const float (&x)[N]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) zero = fmaf(x[i], 0.0f, zero);
  return !(zero == 0.0f);
}

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kForwardCtas)
    forward_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<ForwardSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v);
  const int chunks = int((seg.end - seg.begin + kChunk - 1) / kChunk);
  const int slice = warpgroup_index<Tr>(), warp = threadIdx.x / 32;
  const auto prefetch = [&](int i) {
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    constexpr int kBlocks = Tr::D / 8;
    load_tile<Tr::kThreads, Element>(smem.q[i % 2], a.q, seg.batch, t, n, head, 0, kBlocks,
                                     kBlocks);
    load_tile<Tr::kThreads, Element>(smem.k[i % 2], a.k, seg.batch, t, n, head, 0, kBlocks,
                                     kBlocks);
    load_tile<Tr::kThreads, Element>(smem.v[i % 2], a.v, seg.batch, t, n, head, first_v, kTileV / 8,
                                     valid / 8);
    cp_async_commit();
  };

  if (chunks > 0) prefetch(0);
  for (int i = 0; i < 2; ++i) {
    zero_padding<Tr>(smem.q[i]), zero_padding<Tr>(smem.k[i]);
    for (int row = threadIdx.x; row < kChunk; row += Tr::kThreads) {  // the column of ones
      *reinterpret_cast<uint4*>(smem.v[i].at(row, kTileV / 8)) =
          make_uint4(one<Element>(), 0, 0, 0);
    }
  }
  for (int i = threadIdx.x; i < Tr::kGroups * 8; i += Tr::kThreads) {  // rows below z
    *reinterpret_cast<uint4*>(smem.state.at(kTileV + i % 8, i / 8)) = make_uint4(0, 0, 0, 0);
  }

  StateSlice<Tr> state;
  Moments<Tr> moments;
  state.clear();
  const float* prefix = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
  if (!seg.first) state.load(prefix);
  if (a.initial.kv != nullptr) {
    state.add_public(a.initial, seg.sequence, head, first_v, valid, a.scale);
  }
  load_k_state<Tr>(smem.z, seg.first ? nullptr : prefix + Tr::kF * kTileV, a.initial, seg.sequence,
                   head, a.scale, 1.0f);

  float done = 0;  // tokens of this segment in the state
  for (int i = 0; i < chunks; ++i) {
    auto &sQ = smem.q[i % 2], &sK = smem.k[i % 2];
    ValueTile& sV = smem.v[i % 2];
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    cp_async_wait<0>();
    __syncthreads();
    if (i + 1 < chunks) prefetch(i + 1);

    const float unit = operand_unit<Tr>(tokens_seen(a, seg, head, int64_t(i) * kChunk));
    store_features<Tr>(smem.phi, sK);
    state.publish(smem.state, a.scale, unit);
    const auto publish_z = [&](int f, float z) {
      *reinterpret_cast<Element*>(smem.state.at(kTileV, f / 8) + f % 8 * 2) =
          from_float<Element>((smem.z[f] + z) * feature_coefficient<Tr>(f, a.scale) * unit);
    };
    moments.for_each(publish_z);
    if (threadIdx.x == 0) publish_z(Tr::kConstant, done);
    TokenRows<Tr> rows;
    rows.load(sQ, warp % 4 * 16, smem.transposed[warp]);
    mma_publish();
    __syncthreads();

    float scores[kChunk / 2], out[kExtended / 2];
    uint32_t w[kChunk / 16][4];
    mma_begin(scores);
    if (slice == 0) multiply_scores<Tr>(scores, rows, sK);
    mma_commit();
    moments.template update<false>(sK, nullptr);
    done += float(n);
    mma_wait<0>(scores);
    mma_begin(state.sum);
    state.update(sV, smem.phi);
    mma_commit();
    if (slice == 0) weights<Tr, false>(w, scores, a.scale, unit);
    mma_begin(out);
    if (slice == 0) {
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        mma_AB<Element, kExtended>(out, w[k], sV, 16 * k, 0, k > 0);
      }
    }
    read_state<Tr, kExtended>(out, rows, smem.state, slice == 0);
    mma_commit();
    mma_wait<0>(state.sum, out);
    add_slices<Tr>(out, reinterpret_cast<float*>(smem.phi.bytes));

    // Every warp is past its products here: the tile of v is free for the output.
    if (__syncthreads_or(slice == 0 && any_not_finite(out))) {
      read_state<Tr, kExtended, false>(out, rows, smem.state, false);
      add_slices<Tr>(out, reinterpret_cast<float*>(smem.phi.bytes));
      __syncthreads();
      if (slice == 0) {
        multiply_scores<Tr, false>(scores, rows, sK);
        weights<Tr, false>(w, scores, a.scale, unit);
        add_visible_values<Tr>(out, w, sV,
                               *reinterpret_cast<CoreTile<kChunk, kChunk>*>(smem.phi.bytes));
      }
      __syncthreads();
    }
    if (slice == 0) {
      const int quad = threadIdx.x % 32 / 4 * 4;  // its first lane has the denominators
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float den = __shfl_sync(0xffffffffu, out[kTileV / 2 + 2 * half], quad);
        inverse[half] = 1.0f / (a.normalize ? den : unit);
      }
#pragma unroll
      for (int b = 0; b < kTileV / 8; ++b) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          *reinterpret_cast<uint32_t*>(sV.at(score_row(2 * half), b) + threadIdx.x % 4 * 4) =
              pack<Element>(out[4 * b + 2 * half] * inverse[half],
                            out[4 * b + 2 * half + 1] * inverse[half]);
        }
      }
      __syncwarp();
      store_strip<kTileV / 8, Element>(a.out, seg.batch, t, n, head, first_v, valid / 8, sV,
                                       warp * 16);
    }
  }

  if (seg.last && a.final.kv != nullptr) {
    state.store_public(a.final, seg.sequence, head, first_v, valid, a.scale, 1.0f);
    if (place.tile == 0) {
      float* gZ = a.final.k + seg.sequence * a.final.k_sequence + head * a.final.k_head;
      const auto store_z = [&](int f, float z) {
        gZ[public_row<Tr>(f)] = (smem.z[f] + z) * sqrtf(feature_coefficient<Tr>(f, a.scale));
      };
      __syncthreads();
      moments.for_each(store_z);
      if (threadIdx.x == 0) store_z(Tr::kConstant, done);
    }
  }
}

}  // namespace based::cuda::linear
