// Causal linear attention, forward. A sequence is cut into segments; one CTA walks one segment of
// one (head, 64 columns of v), 128 tokens at a time:
//   out_t = (phi(q_t) S + sum_s w_ts v_s) / (phi(q_t) z + sum_s w_ts)   over s <= t in the chunk,
//   then S += phi(k)^T v, z += sum phi(k).
// Two warpgroups: each takes the outputs of 64 tokens and the state of one half of the features.
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
using PhiTile = CoreTile<Tr::kPhiTokens, Tr::kF>;

// Floats of one state in the workspace: S^T in the registers' order, then z.
template <class Tr>
constexpr int64_t kStateFloats = Tr::kF * (kTileV + 1);

// Zeroes the columns of a q or k tile that pad D to a multiple of 16.
template <class Tr, class Tile>
__device__ __forceinline__ void zero_padding(Tile& tile) {
  if constexpr (Tr::kD > Tr::D) {
    for (int row = threadIdx.x; row < kChunk; row += kThreads) {
      *reinterpret_cast<uint4*>(tile.at(row, Tr::D / 8)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// The column of ones next to a tile of v, for the first n rows.
template <class Element>
__device__ __forceinline__ void store_ones(ValueTile& tile, int n) {
  for (int row = threadIdx.x; row < kChunk; row += kThreads) {
    *reinterpret_cast<uint4*>(tile.at(row, kTileV / 8)) =
        make_uint4(row < n ? one<Element>() : 0, 0, 0, 0);
  }
}

// state += the sum over a chunk of y phi(x)^T, sums += that of w phi(x). The caller has stored phi
// of the first kPhiTokens, passed a barrier and begins here; on return the products have been
// committed, the last of them waited for only where phi came in parts.
template <class Tr, class YTile, class XTile>
__device__ __forceinline__ void update_state(StateSlice<Tr>& state, FeatureSums<Tr>& sums,
                                             const YTile& sY, PhiTile<Tr>& sPhi, const XTile& sX) {
  mma_begin(state.sum);
  sums.update(sY, sPhi, 0);
  state.update(sY, sPhi, 0);
  mma_commit();
#pragma unroll
  for (int first = Tr::kPhiTokens; first < kChunk; first += Tr::kPhiTokens) {
    mma_wait<0>(state.sum);
    __syncthreads();
    store_features<Tr>(sPhi, sX, first);
    mma_publish();
    __syncthreads();
    mma_begin(state.sum);
    sums.update(sY, sPhi, first);
    state.update(sY, sPhi, first);
    mma_commit();
  }
}

// ---- sums of a segment -------------------------------------------------------------------------

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
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists || seg.last) return;  // so every chunk is whole
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

// Each segment's sum becomes the sum of the segments before it (kReverse: after it) in its
// sequence. One thread per four floats of a state and (sequence, head, tile).
template <bool kReverse>
__global__ void __launch_bounds__(256)
    scan_kernel(const __grid_constant__ Arguments a, int state_quads, int blocks_per_state) {
  constexpr int kAhead = 8;  // loads in flight
  const int64_t index = blockIdx.x / blocks_per_state;
  const int element = int(blockIdx.x % blocks_per_state) * 256 + threadIdx.x;
  if (element >= state_quads) return;
  const int64_t per_slot = int64_t(a.heads) * a.tiles;
  const int64_t sequence = index / per_slot, row = index % per_slot;
  const Segment all = sequence_of(a, sequence);
  const int64_t count = max(int64_t(1), (all.end - all.begin + a.segment - 1) / a.segment);
  const int64_t slot = first_slot(a, sequence) + (kReverse ? count - 1 : 0);
  const int64_t stride = (kReverse ? -per_slot : per_slot) * state_quads;
  float4* at =
      reinterpret_cast<float4*>(a.workspace) + (slot * per_slot + row) * state_quads + element;
  float4 sum = {0, 0, 0, 0};
  for (int64_t s = 0; s < count; s += kAhead) {
    float4 own[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {  // the last one's sum is never needed, nor written
      own[i] = s + i + 1 < count ? at[i * stride] : float4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (s + i < count) at[i * stride] = sum;
      sum.x += own[i].x, sum.y += own[i].y, sum.z += own[i].z, sum.w += own[i].w;
    }
    at += kAhead * stride;
  }
}

// ---- outputs of a segment ----------------------------------------------------------------------

constexpr int kStepsInFlight = 2;  // products whose A fragments hold registers

// out (64, N) (+)= phi S.
template <class Tr, int N, bool kAsync = kHasWgmma, class StateTile>
__device__ __forceinline__ void read_state(float (&out)[N / 2], const TokenRows<Tr>& rows,
                                           const StateTile& sState, bool accumulate) {
  static_for<0, Tr::kF / 16>([&](auto step) {
    uint32_t phi[4];
    rows.template features<decltype(step)::value>(phi);
    mma_ABt<typename Tr::Element, N, kAsync>(out, phi, sState, 0, 2 * decltype(step)::value,
                                             accumulate || decltype(step)::value > 0);
    if constexpr (kAsync && decltype(step)::value % kStepsInFlight == kStepsInFlight - 1) {
      mma_commit();
      mma_wait<1>();
    }
  });
}

// Pairs of a warpgroup's 64 rows and 64 others of a chunk are computed kPairs of the others at a
// time.
constexpr int kPairs = 64;

// scores (64, kPairs) = x times rows first ... of `other`, transposed
template <class Tr, bool kAsync = kHasWgmma, class Tile>
__device__ __forceinline__ void multiply_scores(float (&scores)[kPairs / 2],
                                                const TokenRows<Tr>& rows, const Tile& other,
                                                int first) {
#pragma unroll
  for (int i = 0; i < Tr::kD / 16; ++i) {
    mma_ABt<typename Tr::Element, kPairs, kAsync>(scores, rows.x[i], other, first, 2 * i, i > 0);
  }
}

// Which pairs of a (64, 64) tile of a chunk count: all, or those on and below its diagonal, or
// above.
enum class Visible { kAll, kLower, kUpper };

// fn(k, visible) for each 16 columns k of the kPart-th kPairs; visible(half, e) says whether the
// element e of their half-th 8 columns counts.
template <Visible kVisible, int kPart, class Fn>
__device__ __forceinline__ void for_each_strip(const Fn& fn) {
  const int strip = __shfl_sync(0xffffffffu, int(threadIdx.x) % 128 / 32, 0);  // the warp's rows
  const int below = threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;  // row - column of element 0
  static_for<0, kPairs / 16>([&](auto k) {
    constexpr int kStrip = kPart * (kPairs / 16) + decltype(k)::value;
    if (kVisible == Visible::kAll ||
        (kVisible == Visible::kLower ? kStrip < strip : kStrip > strip)) {
      fn(k, [](int, int) { return true; });
    } else if (kStrip == strip) {
      fn(k, [&](int half, int e) {
        const int distance = below + e / 2 * 8 - 8 * half - e % 2;
        return kVisible == Visible::kLower ? distance >= 0 : distance <= 0;
      });
    } else {
      fn(k, [](int, int) { return false; });
    }
  });
}

// w = 1 + s + s^2/2 of the visible pairs, times unit, as A fragments.
template <class Tr, Visible kVisible, int kPart>
__device__ __forceinline__ void weights(uint32_t (&w)[kPairs / 16][4],
                                        const float (&scores)[kPairs / 2], float scale,
                                        float unit) {
  const float a = 0.5f * scale * scale * unit, b = scale * unit;
  for_each_strip<kVisible, kPart>([&](auto k, const auto& visible) {
    constexpr int kStrip = decltype(k)::value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float s = scores[8 * kStrip + 4 * half + e];
        value[e] = visible(half, e) ? fmaf(s, fmaf(s, a, b), unit) : 0.0f;
      }
      w[kStrip][2 * half] = pack<typename Tr::Element>(value[0], value[1]);
      w[kStrip][2 * half + 1] = pack<typename Tr::Element>(value[2], value[3]);
    }
  });
}

template <int N>
__device__ __forceinline__ bool any_not_finite(const float (&x)[N]) {
  float zero = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) zero = fmaf(x[i], 0.0f, zero);
  return __any_sync(0xffffffffu, !(zero == 0.0f));
}

// x (16 rows a warp, N) += sum over the visible s <= t of w_ts y_s, kPairs of the diagonal tile,
// one by one: a product would carry 0 * NaN of a later token into earlier rows. sW: scratch of the
// warp.
template <class Element, int N, int kPart, class Tile>
__device__ __forceinline__ void add_visible(float (&x)[N / 2], const uint32_t (&w)[kPairs / 16][4],
                                            const Tile& sY, int first, Element* sW) {
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPairs / 8; ++i) {
    *reinterpret_cast<uint32_t*>(sW + g * kPairs + 8 * i + 2 * c) = w[i / 2][i % 2 * 2];
    *reinterpret_cast<uint32_t*>(sW + (g + 8) * kPairs + 8 * i + 2 * c) = w[i / 2][i % 2 * 2 + 1];
  }
  __syncwarp();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int last = min(acc_row(2 * half) - kPart * kPairs, kPairs - 1);
#pragma unroll 1
    for (int s = 0; s <= last; ++s) {
      const float weight = to_float(sW[(g + 8 * half) * kPairs + s]);
#pragma unroll
      for (int i = 0; i < N / 8; ++i) {
        const float2 y =
            unpack<Element>(*reinterpret_cast<const uint32_t*>(sY.at(first + s, i) + 4 * c));
        x[4 * i + 2 * half] += weight * y.x, x[4 * i + 2 * half + 1] += weight * y.y;
      }
    }
  }
}

// The numerators and the denominator (column 64) of a warpgroup's 64 tokens, unnormalised, times
// unit. update_state() may commit products of its own; they are waited for.
template <class Tr, class QTile, class StateTile, class Fn>
__device__ __forceinline__ void outputs(float (&out)[kExtended / 2], const TokenRows<Tr>& rows,
                                        const QTile& sK, const ValueTile& sV,
                                        const StateTile& sState, float scale, float unit,
                                        const Fn& update_state) {
  using Element = typename Tr::Element;
  const int group = warpgroup_index();
  const auto add_pairs = [&](auto visible, auto part, int first) {
    float scores[kPairs / 2];
    uint32_t w[kPairs / 16][4];
    mma_begin(scores);
    multiply_scores<Tr>(scores, rows, sK, first);
    mma_commit();
    mma_wait<0>(scores, out);
    weights<Tr, decltype(visible)::value, decltype(part)::value>(w, scores, scale, unit);
    mma_begin(out);
#pragma unroll
    for (int k = 0; k < kPairs / 16; ++k) {
      mma_AB<Element, kExtended>(out, w[k], sV, first + 16 * k, 0);
    }
    mma_commit();
  };
  constexpr std::integral_constant<Visible, Visible::kAll> kAll{};
  constexpr std::integral_constant<Visible, Visible::kLower> kLower{};
#pragma unroll
  for (float& x : out) x = 0;
  if (group == 1) {  // the other warpgroup's tokens, all of them earlier
    static_for<0, kRows / kPairs>(
        [&](auto part) { add_pairs(kAll, part, decltype(part)::value * kPairs); });
    mma_wait<0>(out);
  }
  static_for<0, kRows / kPairs>(
      [&](auto part) { add_pairs(kLower, part, group * kRows + decltype(part)::value * kPairs); });
  update_state();
  read_state<Tr, kExtended>(out, rows, sState, true);
  mma_commit();
  mma_wait<0>(out);
}

// The same where a value is NaN or infinite. sW: scratch of the warp, 16 x kPairs.
template <class Tr, class QTile, class StateTile>
__device__ __forceinline__ void outputs_one_by_one(float (&out)[kExtended / 2],
                                                   const TokenRows<Tr>& rows, const QTile& sK,
                                                   const ValueTile& sV, const StateTile& sState,
                                                   float scale, float unit,
                                                   typename Tr::Element* sW) {
  using Element = typename Tr::Element;
  const int group = warpgroup_index();
  float scores[kPairs / 2];
  uint32_t w[kPairs / 16][4];
  read_state<Tr, kExtended, false>(out, rows, sState, false);
  static_for<0, kRows / kPairs>([&](auto part) {
    constexpr int kPart = decltype(part)::value;
    if (group == 1) {
      multiply_scores<Tr, false>(scores, rows, sK, kPart * kPairs);
      weights<Tr, Visible::kAll, kPart>(w, scores, scale, unit);
#pragma unroll
      for (int k = 0; k < kPairs / 16; ++k) {
        mma_AB<Element, kExtended, false>(out, w[k], sV, kPart * kPairs + 16 * k, 0);
      }
    }
    const int first = group * kRows + kPart * kPairs;
    multiply_scores<Tr, false>(scores, rows, sK, first);
    weights<Tr, Visible::kLower, kPart>(w, scores, scale, unit);
    add_visible<Element, kExtended, kPart>(out, w, sV, first, sW);
  });
}

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
  const float* prefix = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
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
