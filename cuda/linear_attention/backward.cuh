// Causal linear attention, backward. With u_t = dout_t / den_t and delta_t = -<u_t, out_t> (u =
// dout, delta = 0 without the normaliser) every weight has the gradient dw_ts = <u_t, v_s> +
// delta_t, and
//   dq_t = sum_s dw_ts (1 + s_ts) scale k_s + J(q_t)^T (S u_t + z delta_t)
//   dk_s = sum_t dw_ts (1 + s_ts) scale q_t + J(k_s)^T (R v_s + r)
//   dv_s = sum_t w_ts u_t + phi(k_s) R
// where the sums run over the pairs of a chunk with s <= t, S, z hold the tokens before it, and
// R = sum phi(q_t)^T u_t, r = sum delta_t phi(q_t) hold the tokens after it. J is phi's Jacobian.
// dq_kernel walks its segment forward and recomputes out; dkv_kernel walks it backward. S, then R,
// at the segments' ends come from increments and a scan as in forward.cuh, in one workspace. All of
// it is linear in the columns of v, so that tiles of V add up: delta, dq and dk are partial sums.
// Precision: as forward; u, delta (in two parts), dw (1 + s) and dphi x are rounded to 16 bits as
// operands.
#pragma once

#include "linear_attention/forward.cuh"

namespace based::cuda::linear {

constexpr int kGradientRows =
    kTileV + 16;  // rows of the state's copy that dphi reads: k of a product

__device__ __forceinline__ int64_t token_index(const Arguments& a, const Segment& seg, int tile,
                                               int head, int64_t t) {
  return ((tile * (a.cu_seqlens == nullptr ? a.sequences : 1) + seg.batch) * a.seqlen + t) *
             a.heads +
         head;
}

// 1 / den and delta of 64 tokens, as they scale the operand u; zeros below n.
template <class Tr>
__device__ __forceinline__ void load_scalars(float* sInverse, float* sDelta, const Arguments& a,
                                             const Segment& seg, int tile, int head, int64_t t,
                                             int n, float unit) {
  for (int i = threadIdx.x; i < kChunk; i += Tr::kThreads) {
    const int64_t index = token_index(a, seg, tile, head, t + (i < n ? i : 0));
    sInverse[i] = i < n ? (a.normalize ? a.inverse_den[index] * unit : 1.0f) : 0.0f;
    sDelta[i] = i < n && a.normalize ? a.delta[index] * unit : 0.0f;
  }
}

// Rows of a tile of dout times sInverse, rounded, in place: u.
template <class Tr, class Tile>
__device__ __forceinline__ void scale_rows(Tile& tile, const float* sInverse) {
  using Element = typename Tr::Element;
  for (int p = threadIdx.x; p < kChunk * kTileV / 8; p += Tr::kThreads) {
    const int row = p % kChunk;
    uint4& at = *reinterpret_cast<uint4*>(tile.at(row, p / kChunk));
    uint4 x = at;
    uint32_t* words = reinterpret_cast<uint32_t*>(&x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = unpack<Element>(words[i]);
      words[i] = pack<Element>(value.x * sInverse[row], value.y * sInverse[row]);
    }
    at = x;
  }
}

// delta as an operand: rounded, and what the rounding left.
template <class Element>
__device__ __forceinline__ uint32_t two_parts(float x) {
  const float high = unpack<Element>(pack<Element>(x, 0.0f)).x;
  return pack<Element>(high, x - high);
}

// dx += J(x)^T dphi for the groups from kFirst on; dx (16, D) a warp and dphi (16, N) in the
// accumulators' layout. x_j x_{j+r} gives x_{j+r} to dx_j in place and x_j to dx_{j+r} by a product
// with a permutation.
template <class Tr, int kFirst, int N>
__device__ __forceinline__ void add_feature_gradient(float (&dx)[Tr::D / 2],
                                                     const float (&dphi)[N / 2],
                                                     const TokenRows<Tr>& rows) {
  using Element = typename Tr::Element;
  constexpr int D = Tr::D;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  static_for<kFirst / 2, kFirst / 2 + N / 16>([&](auto step) {
    constexpr int kStep = decltype(step)::value;
    uint32_t turned[4] = {}, a[4] = {};
    if constexpr (TokenRows<Tr>::turns(kStep)) rows.template rotated<kStep>(turned);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Group group = feature_group<D>(2 * kStep + half);
      const float* d = dphi + 4 * (2 * kStep + half - kFirst);
#pragma unroll
      for (int r = 0; r < 2; ++r) {  // rows g and g + 8
        float* to = dx + 4 * (group.j / 8) + 2 * r;
        float d0 = d[2 * r], d1 = d[2 * r + 1];
        const float2 x = unpack<Element>(rows.x[group.j / 16][group.j / 8 % 2 * 2 + r]);
        if (group.kind == GroupKind::kLinear) to[0] += d0, to[1] += d1;
        if (group.kind != GroupKind::kProduct && group.kind != GroupKind::kMixed) continue;
        if (group.rotation == 0) {
          to[0] = fmaf(2 * x.x, d0, to[0]), to[1] = fmaf(2 * x.y, d1, to[1]);
          continue;
        }
        if (group.kind == GroupKind::kMixed && c >= 2) d0 = d1 = 0;
        const float2 other = unpack<Element>(turned[2 * half + r]);
        to[0] = fmaf(other.x, d0, to[0]), to[1] = fmaf(other.y, d1, to[1]);
        a[2 * half + r] = pack<Element>(x.x * d0, x.y * d1);
      }
    }
    if constexpr (TokenRows<Tr>::turns(kStep)) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // row k goes to column k + j + rotation
          const Group group = feature_group<D>(2 * kStep + half);
          const int t = (8 * n + g - 2 * c - group.j - group.rotation + 3 * D) % D;
          b[half] = t == 0 ? one<Element>() : t == 1 ? one<Element>() << 16 : 0;
        }
        warp_mma<Element>(dx + 4 * n, a, b[0], b[1]);
      }
    }
  });
}

// dx += J(x)^T (state times y) for this slice; y (64, 80) as A fragments.
template <class Tr, class StateTile>
__device__ __forceinline__ void add_state_gradient(float (&dx)[Tr::D / 2],
                                                   const uint32_t (&y)[kGradientRows / 16][4],
                                                   const StateTile& sState,
                                                   const TokenRows<Tr>& rows) {
  constexpr int N = Tr::kGradientN;
  static_for<0, Tr::kSlices>([&](auto slice) {
    if (warpgroup_index<Tr>() != decltype(slice)::value) return;
    static_for<0, Tr::kSliceF / N>([&](auto part) {
      constexpr int kFirst =
          decltype(slice)::value * Tr::kSliceGroups + decltype(part)::value * (N / 8);
      float dphi[N / 2];
      mma_begin(dphi);
#pragma unroll
      for (int k = 0; k < kGradientRows / 16; ++k) {
        mma_AB<typename Tr::Element, N>(dphi, y[k], sState, 16 * k, kFirst, k > 0);
      }
      mma_commit();
      mma_wait<0>(dphi);
      add_feature_gradient<Tr, kFirst, N>(dx, dphi, rows);
    });
  });
}

// A warp's rows of dq or dk, or of a tile's share of them.
template <class Tr>
__device__ __forceinline__ void store_gradient(const Rows& to, float* partial, const Arguments& a,
                                               const Segment& seg, int tile, int head, int64_t t,
                                               int n, const float (&dx)[Tr::D / 2], float unit) {
#pragma unroll
  for (int i = 0; i < Tr::D / 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = score_row(2 * half), column = score_column(i, 0);
      const float low = dx[4 * i + 2 * half] * unit, high = dx[4 * i + 2 * half + 1] * unit;
      if (row >= n) continue;
      if (partial != nullptr) {
        float* at = partial + token_index(a, seg, tile, head, t + row) * Tr::D + column;
        *reinterpret_cast<float2*>(at) = make_float2(low, high);
      } else {
        auto* at = to.at<typename Tr::Element>(seg.batch, t + row, head) + column;
        *reinterpret_cast<uint32_t*>(at) = pack<typename Tr::Element>(low, high);
      }
    }
  }
}

// to = the tiles' shares added up. One thread per two elements.
template <class Element>
__global__ void __launch_bounds__(256)
    add_tiles_kernel(Rows to, const float* partial, int64_t seqlen, int heads, int feature_dim,
                     int tiles, int64_t pairs) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= pairs) return;
  float2 sum = {0, 0};
  for (int tile = 0; tile < tiles; ++tile) {
    const float2 share = reinterpret_cast<const float2*>(partial)[tile * pairs + index];
    sum.x += share.x, sum.y += share.y;
  }
  const int64_t row = index / (feature_dim / 2), token = row / heads;
  Element* at = to.at<Element>(token / seqlen, token % seqlen, row % heads);
  reinterpret_cast<uint32_t*>(at)[index % (feature_dim / 2)] = pack<Element>(sum.x, sum.y);
}

// The gradient of the initial k_state (N, H, F) = the tiles' r added up, partial (N, H, tiles,
// width).
static __global__ void __launch_bounds__(256)
    add_r_kernel(State to, const float* partial, int heads, int F, int width, int tiles,
                 int64_t count) {
  const int64_t index = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (index >= count) return;
  const int64_t row = index / F, f = index % F;
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) sum += partial[(row * tiles + tile) * width + f];
  to.k[row / heads * to.k_sequence + row % heads * to.k_head + f] = sum;
}

// ---- R and r of a segment ----------------------------------------------------------------------

template <class Tr>
struct GradientIncrementSmem {
  alignas(128) TokenTile<Tr> q[2];
  CoreTile<kChunk, kTileV> u[2];
  PhiTile<Tr> phi;
  float inverse[kChunk], delta[kChunk];
};

// Sum of 64 floats, the same in every lane of a warp.
__device__ __forceinline__ float sum_chunk(const float* x) {
  float sum = x[threadIdx.x % 32] + x[threadIdx.x % 32 + 32];
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  return sum;
}

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kBackwardCtas)
    gradient_increment_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<GradientIncrementSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists || seg.first) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v) / 8;
  const int chunks = int((seg.end - seg.begin + kChunk - 1) / kChunk);
  const auto prefetch = [&](int i) {
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    load_tile<Tr::kThreads, Element>(smem.q[i % 2], a.q, seg.batch, t, n, head, 0, Tr::D / 8,
                                     Tr::D / 8);
    load_tile<Tr::kThreads, Element>(smem.u[i % 2], a.dout, seg.batch, t, n, head, first_v,
                                     kTileV / 8, valid);
    cp_async_commit();
  };

  prefetch(0);
  zero_padding<Tr>(smem.q[0]), zero_padding<Tr>(smem.q[1]);
  StateSlice<Tr> state;
  Moments<Tr> moments;
  state.clear();
  float constant = 0, unit = 1;
  for (int i = 0; i < chunks; ++i) {
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    const float next_unit = gradient_unit<Tr>(a, tokens_seen(a, seg, head, int64_t(i) * kChunk));
    if (Tr::kHalf && next_unit != unit) {
      const float factor = next_unit / unit;
      state.scale(factor), moments.scale(factor), constant *= factor;
    }
    unit = next_unit;
    cp_async_wait<0>();
    __syncthreads();
    load_scalars<Tr>(smem.inverse, smem.delta, a, seg, place.tile, head, t, n, unit);
    if (i + 1 < chunks) prefetch(i + 1);
    store_features<Tr>(smem.phi, smem.q[i % 2]);
    __syncthreads();
    scale_rows<Tr>(smem.u[i % 2], smem.inverse);
    mma_publish();
    __syncthreads();
    mma_begin(state.sum);
    state.update(smem.u[i % 2], smem.phi);
    mma_commit();
    moments.template update<true>(smem.q[i % 2], smem.delta);
    constant += sum_chunk(smem.delta);
    mma_wait<0>(state.sum);
  }
  state.scale(1 / unit), moments.scale(1 / unit), constant /= unit;
  float* workspace = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
  state.store(workspace);
  float* gZ = workspace + Tr::kF * kTileV;
  moments.for_each([&](int f, float value) { gZ[f] = value; });
  if (threadIdx.x == 0) gZ[Tr::kConstant] = constant;
}

// ---- dq ----------------------------------------------------------------------------------------

template <class Tr>
struct BackwardSmem {
  using StateTile = CoreTile<kGradientRows, Tr::kF>;
  static constexpr int kStages = Tr::kBackwardStages;
  alignas(128) TokenTile<Tr> q[kStages], k[kStages];
  ValueTile v[kStages];
  CoreTile<kChunk, kTileV> u[kStages];  // dout, then u
  PhiTile<Tr> phi;                      // also: partial sums of slices
  StateTile state;
  char transposed[Tr::kThreads / 32][TokenRows<Tr>::kTransposedBytes];
  float z[Tr::kF];
  float inverse[kChunk], delta[kChunk];
};

template <class Tr>
__device__ __forceinline__ void prefetch_chunk(BackwardSmem<Tr>& smem, const Arguments& a,
                                               const Segment& seg, const Place& place, int i) {
  using Element = typename Tr::Element;
  constexpr int kBlocks = Tr::D / 8, kThreads = Tr::kThreads;
  const int64_t t = seg.begin + int64_t(i) * kChunk;
  const int n = int(min(int64_t(kChunk), seg.end - t)), stage = i % Tr::kBackwardStages;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v) / 8;
  load_tile<kThreads, Element>(smem.q[stage], a.q, seg.batch, t, n, head, 0, kBlocks, kBlocks);
  load_tile<kThreads, Element>(smem.k[stage], a.k, seg.batch, t, n, head, 0, kBlocks, kBlocks);
  load_tile<kThreads, Element>(smem.v[stage], a.v, seg.batch, t, n, head, first_v, 8, valid);
  load_tile<kThreads, Element>(smem.u[stage], a.dout, seg.batch, t, n, head, first_v, 8, valid);
  cp_async_commit();
}

template <class Tr>
__device__ __forceinline__ void prepare_tiles(BackwardSmem<Tr>& smem) {
  for (int i = 0; i < Tr::kBackwardStages; ++i) {
    zero_padding<Tr>(smem.q[i]), zero_padding<Tr>(smem.k[i]);
    for (int row = threadIdx.x; row < kChunk; row += Tr::kThreads) {  // the column of ones
      *reinterpret_cast<uint4*>(smem.v[i].at(row, kTileV / 8)) =
          make_uint4(one<typename Tr::Element>(), 0, 0, 0);
    }
  }
  for (int i = threadIdx.x; i < Tr::kGroups * 16; i += Tr::kThreads) {  // rows below the state's
    *reinterpret_cast<uint4*>(smem.state.at(kTileV + i % 16, i / 16)) = make_uint4(0, 0, 0, 0);
  }
}

// Row `row` of the state's copy, feature f.
template <class Tr, class StateTile>
__device__ __forceinline__ void store_row(StateTile& sState, int row, int f, float value) {
  *reinterpret_cast<typename Tr::Element*>(sState.at(row, f / 8) + f % 8 * 2) =
      from_float<typename Tr::Element>(value);
}

// dw (1 + s) scale unit where s <= t, as A fragments. delta: of the row's token, or in shared
// memory of the column's (kUpper).
template <class Tr, bool kUpper>
__device__ __forceinline__ void score_gradients(uint32_t (&ds)[kChunk / 16][4],
                                                const float (&scores)[kChunk / 2],
                                                const float (&dw)[kChunk / 2],
                                                const float (&row_delta)[2], const float* sDelta,
                                                float scale, float unit) {
  const float a = scale * scale * unit, b = scale * unit;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i) {
    float value[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float delta = kUpper ? sDelta[score_column(i, e)] : row_delta[e / 2];
      const bool visible =
          kUpper ? score_column(i, e) >= score_row(e) : score_column(i, e) <= score_row(e);
      const float slope = fmaf(scores[4 * i + e], a, b);
      value[e] = visible ? (dw[4 * i + e] + delta) * slope : 0.0f;
    }
    ds[i / 2][i % 2 * 2] = pack<typename Tr::Element>(value[0], value[1]);
    ds[i / 2][i % 2 * 2 + 1] = pack<typename Tr::Element>(value[2], value[3]);
  }
}

// dx (16, D) a warp += ds (16, 64) times the rows of x.
template <class Tr, class Tile>
__device__ __forceinline__ void multiply_rows(float (&dx)[Tr::D / 2],
                                              const uint32_t (&ds)[kChunk / 16][4],
                                              const Tile& sX) {
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Tr::D / 8; n += 2) {
      uint32_t b[4];
      load_b(b, sX, 16 * k, n);
      warp_mma<typename Tr::Element>(dx + 4 * n, ds[k], b[0], b[1]);
      if (n + 1 < Tr::D / 8) warp_mma<typename Tr::Element>(dx + 4 * n + 4, ds[k], b[2], b[3]);
    }
  }
}

// The same without the products of masked zeros, for NaN or infinity among later tokens' x.
template <class Tr, class Tile>
__device__ __forceinline__ void multiply_visible_rows(float (&dx)[Tr::D / 2],
                                                      const uint32_t (&ds)[kChunk / 16][4],
                                                      const Tile& sX,
                                                      CoreTile<kChunk, kChunk>& sW) {
  using Element = typename Tr::Element;
  const int c4 = threadIdx.x % 4 * 4;
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i) {
    *reinterpret_cast<uint32_t*>(sW.at(score_row(0), i) + c4) = ds[i / 2][i % 2 * 2];
    *reinterpret_cast<uint32_t*>(sW.at(score_row(2), i) + c4) = ds[i / 2][i % 2 * 2 + 1];
  }
  __syncwarp();
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const int t = score_row(2 * half);
#pragma unroll 1
    for (int s = 0; s <= t; ++s) {
      const float d = to_float(*reinterpret_cast<const Element*>(sW.at(t, s / 8) + s % 8 * 2));
#pragma unroll
      for (int i = 0; i < Tr::D / 8; ++i) {
        const float2 x = unpack<Element>(*reinterpret_cast<const uint32_t*>(sX.at(s, i) + c4));
        if (half == 0) dx[4 * i] += d * x.x, dx[4 * i + 1] += d * x.y;
        if (half == 1) dx[4 * i + 2] += d * x.x, dx[4 * i + 3] += d * x.y;
      }
    }
  }
}

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kBackwardCtas)
    dq_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<BackwardSmem<Tr>*>(raw);
  auto& sScratch = *reinterpret_cast<CoreTile<kChunk, kChunk>*>(smem.phi.bytes);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists || seg.begin == seg.end) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v);
  const int chunks = int((seg.end - seg.begin + kChunk - 1) / kChunk);
  const int slice = warpgroup_index<Tr>(), warp = threadIdx.x / 32;

  prefetch_chunk(smem, a, seg, place, 0);
  prepare_tiles(smem);
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

  float done = 0;
  for (int i = 0; i < chunks; ++i) {
    const int stage = i % Tr::kBackwardStages;
    auto &sQ = smem.q[stage], &sK = smem.k[stage];
    auto& sV = smem.v[stage];
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    cp_async_wait<0>();
    __syncthreads();
    if (Tr::kBackwardStages > 1 && i + 1 < chunks) prefetch_chunk(smem, a, seg, place, i + 1);

    const float tokens = tokens_seen(a, seg, head, int64_t(i) * kChunk);
    const float unit = operand_unit<Tr>(tokens), gradient = gradient_unit<Tr>(a, tokens);
    store_features<Tr>(smem.phi, sK);
    state.publish(smem.state, a.scale, unit);
    const auto publish_z = [&](int f, float z) {
      const float value = (smem.z[f] + z) * feature_coefficient<Tr>(f, a.scale) * unit;
      store_row<Tr>(smem.state, kTileV, f, value);
      store_row<Tr>(smem.state, kTileV + 1, f, value);  // delta's second part reads it again
    };
    moments.for_each(publish_z);
    if (threadIdx.x == 0) publish_z(Tr::kConstant, done);
    TokenRows<Tr> rows;
    rows.load(sQ, warp % 4 * 16, smem.transposed[warp]);
    mma_publish();
    __syncthreads();

    float scores[kChunk / 2];
    uint32_t u[kGradientRows / 16][4];
#pragma unroll
    for (int k = 0; k < kTileV / 16; ++k) load_a(u[k], smem.u[stage], warp % 4 * 16, 2 * k);
    {
      float out[kExtended / 2];
      mma_begin(scores);
      if (slice == 0) multiply_scores<Tr>(scores, rows, sK);
      mma_commit();
      moments.template update<false>(sK, nullptr);
      done += float(n);
      mma_wait<0>(scores);
      mma_begin(state.sum);
      state.update(sV, smem.phi);
      mma_commit();
      mma_begin(out);
      if (slice == 0) {
        uint32_t w[kChunk / 16][4];
        weights<Tr, false>(w, scores, a.scale, unit);
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
          mma_AB<Element, kExtended>(out, w[k], sV, 16 * k, 0, k > 0);
        }
      }
      read_state<Tr, kExtended>(out, rows, smem.state, slice == 0);
      mma_commit();
      mma_wait<0>(state.sum, out);
      add_slices<Tr>(out, reinterpret_cast<float*>(smem.phi.bytes));
      // NaN among later values of v: as in the forward kernel.
      if (__syncthreads_or(slice == 0 && any_not_finite(out))) {
        read_state<Tr, kExtended, false>(out, rows, smem.state, false);
        add_slices<Tr>(out, reinterpret_cast<float*>(smem.phi.bytes));
        __syncthreads();
        if (slice == 0) {
          uint32_t w[kChunk / 16][4];
          weights<Tr, false>(w, scores, a.scale, unit);
          add_visible_values<Tr>(out, w, sV, sScratch);
        }
        __syncthreads();
      }
      if (slice == 0) {  // 1 / den, u and delta of this warp's rows
        const int quad = threadIdx.x % 32 / 4 * 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = score_row(2 * half);
          const float den = __shfl_sync(0xffffffffu, out[kTileV / 2 + 2 * half], quad);
          const float inverse = row >= n ? 0.0f : a.normalize ? 1.0f / den : 1.0f;
          float dot = 0;
#pragma unroll
          for (int b = 0; b < kTileV / 8; ++b) {
            const float2 d = unpack<Element>(u[b / 2][b % 2 * 2 + half]);
            const float factor = inverse * unit * gradient;
            const float2 rounded = unpack<Element>(pack<Element>(d.x * factor, d.y * factor));
            dot = fmaf(rounded.x, out[4 * b + 2 * half], dot);
            dot = fmaf(rounded.y, out[4 * b + 2 * half + 1], dot);
          }
          dot += __shfl_xor_sync(0xffffffffu, dot, 1);
          dot += __shfl_xor_sync(0xffffffffu, dot, 2);
          if (threadIdx.x % 4 == 0) {  // out and den carry unit, u does not
            smem.inverse[row] = a.normalize ? inverse * unit * gradient : inverse;
            smem.delta[row] = a.normalize ? -dot * inverse : 0.0f;
            if (row < n && a.normalize) {
              const int64_t index = token_index(a, seg, place.tile, head, t + row);
              a.inverse_den[index] = inverse * unit;
              a.delta[index] = -dot * inverse / gradient;
            }
          }
        }
      }
    }
    __syncthreads();

    float row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = smem.inverse[score_row(2 * half)];
      row_delta[half] = smem.delta[score_row(2 * half)];
#pragma unroll
      for (int b = 0; b < kTileV / 8; ++b) {
        uint32_t& word = u[b / 2][b % 2 * 2 + half];
        const float2 d = unpack<Element>(word);
        word = pack<Element>(d.x * inverse, d.y * inverse);
      }
      u[kTileV / 16][half] = threadIdx.x % 4 == 0 ? two_parts<Element>(row_delta[half]) : 0;
      u[kTileV / 16][2 + half] = 0;
    }
    float dq[Tr::D / 2] = {};
    uint32_t ds[kChunk / 16][4];
    if (slice == 0) {
      float dw[kChunk / 2];
      mma_begin(dw);
#pragma unroll
      for (int k = 0; k < kTileV / 16; ++k) {
        mma_ABt<Element, kChunk>(dw, u[k], sV, 0, 2 * k, k > 0);
      }
      mma_commit();
      mma_wait<0>(dw);
      score_gradients<Tr, false>(ds, scores, dw, row_delta, nullptr, a.scale, unit);
      multiply_rows<Tr>(dq, ds, sK);
    }
    const bool not_finite = any_not_finite(dq);
    if (__syncthreads_or(slice == 0 && not_finite)) {
      if (slice == 0) {
#pragma unroll
        for (int j = 0; j < Tr::D / 2; ++j) dq[j] = 0;
        multiply_visible_rows<Tr>(dq, ds, sK, sScratch);
      }
      __syncthreads();
    }
    add_state_gradient<Tr>(dq, u, smem.state, rows);
    add_slices<Tr>(dq, reinterpret_cast<float*>(smem.phi.bytes));
    if (slice == 0) {
      store_gradient<Tr>(a.dq, a.partial_dq, a, seg, place.tile, head, t, n, dq,
                         1.0f / (unit * gradient));
    }
    if (Tr::kBackwardStages == 1 && i + 1 < chunks) {
      __syncthreads();
      prefetch_chunk(smem, a, seg, place, i + 1);
    }
  }
}

// ---- dk, dv ------------------------------------------------------------------------------------

template <class Tr>
__global__ void __launch_bounds__(Tr::kThreads, Tr::kBackwardCtas)
    dkv_kernel(const __grid_constant__ Arguments a) {
  using Element = typename Tr::Element;
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<BackwardSmem<Tr>*>(raw);
  const Place place(a);
  const Segment seg = segment_of(a, place.slot);
  if (!seg.exists) return;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v);
  const int chunks = int((seg.end - seg.begin + kChunk - 1) / kChunk);
  const int slice = warpgroup_index<Tr>(), warp = threadIdx.x / 32;

  if (chunks > 0) prefetch_chunk(smem, a, seg, place, chunks - 1);
  prepare_tiles(smem);
  float unit_u = gradient_unit<Tr>(a, tokens_seen(a, seg, head, int64_t(chunks - 1) * kChunk));
  StateSlice<Tr> state;
  Moments<Tr> moments;
  state.clear();
  const float* suffix = a.workspace + place.index(a, place.slot) * kStateFloats<Tr>;
  if (!seg.last) state.load(suffix);
  if (a.final.kv != nullptr) {
    state.add_public(a.final, seg.sequence, head, first_v, valid, a.scale);
  }
  state.scale(unit_u);
  // Each tile of V adds its share of r to dk; the gradient of the final k_state goes with the
  // first.
  load_k_state<Tr>(smem.z, seg.last ? nullptr : suffix + Tr::kF * kTileV,
                   place.tile == 0 ? a.final : State{}, seg.sequence, head, a.scale, unit_u);
  float constant = 0;

  for (int i = chunks - 1; i >= 0; --i) {
    const int stage = i % Tr::kBackwardStages;
    auto &sQ = smem.q[stage], &sK = smem.k[stage];
    auto& sV = smem.v[stage];
    auto& sU = smem.u[stage];
    const int64_t t = seg.begin + int64_t(i) * kChunk;
    const int n = int(min(int64_t(kChunk), seg.end - t));
    const float tokens = tokens_seen(a, seg, head, int64_t(i) * kChunk);
    const float unit = operand_unit<Tr>(tokens), gradient = gradient_unit<Tr>(a, tokens);
    cp_async_wait<0>();
    __syncthreads();
    if (Tr::kHalf && gradient != unit_u) {
      const float factor = gradient / unit_u;
      state.scale(factor), moments.scale(factor), constant *= factor;
      for (int f = threadIdx.x; f < Tr::kF; f += Tr::kThreads) smem.z[f] *= factor;
      unit_u = gradient;
    }
    load_scalars<Tr>(smem.inverse, smem.delta, a, seg, place.tile, head, t, n, gradient);
    __syncthreads();
    if (Tr::kBackwardStages > 1 && i > 0) prefetch_chunk(smem, a, seg, place, i - 1);
    scale_rows<Tr>(sU, smem.inverse);
    store_features<Tr>(smem.phi, sQ);
    state.publish(smem.state, a.scale, unit);
    const auto publish_r = [&](int f, float r) {
      const float value = (smem.z[f] + r) * feature_coefficient<Tr>(f, a.scale) * unit;
      const float high = to_float(from_float<Element>(value));
      store_row<Tr>(smem.state, kTileV, f, high);
      store_row<Tr>(smem.state, kTileV + 1, f, value - high);
    };
    moments.for_each(publish_r);
    if (threadIdx.x == 0) publish_r(Tr::kConstant, constant);
    TokenRows<Tr> rows;
    rows.load(sK, warp % 4 * 16, smem.transposed[warp]);
    mma_publish();
    __syncthreads();

    float scores[kChunk / 2], dk[Tr::D / 2] = {};
    mma_begin(scores);
    if (slice == 0) multiply_scores<Tr>(scores, rows, sQ);
    mma_commit();
    moments.template update<true>(sQ, smem.delta);
    constant += sum_chunk(smem.delta);
    mma_wait<0>(scores);
    mma_begin(state.sum);
    state.update(sU, smem.phi);
    mma_commit();
    {
      float dv[kTileV / 2];
      mma_begin(dv);
      if (slice == 0) {
        uint32_t w[kChunk / 16][4];
        weights<Tr, true>(w, scores, a.scale, unit);
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
          mma_AB<Element, kTileV>(dv, w[k], sU, 16 * k, 0, k > 0);
        }
      }
      read_state<Tr, kTileV>(dv, rows, smem.state, slice == 0);
      mma_commit();
      mma_wait<0>(state.sum, dv);
      add_slices<Tr>(dv, reinterpret_cast<float*>(smem.phi.bytes));
      // y = v and, for r in two parts, two ones.
      uint32_t y[kGradientRows / 16][4];
#pragma unroll
      for (int k = 0; k < kTileV / 16; ++k) load_a(y[k], sV, warp % 4 * 16, 2 * k);
      const uint32_t ones = threadIdx.x % 4 == 0 ? one<Element>() * 0x10001u : 0;
      y[kTileV / 16][0] = y[kTileV / 16][1] = ones;
      y[kTileV / 16][2] = y[kTileV / 16][3] = 0;
      if (Tr::kSlices > 1)
        __syncthreads();  // every slice has its rows of v: they can be overwritten
      if (slice == 0) {
        const float factor = 1.0f / (unit * gradient);
        __syncwarp();
#pragma unroll
        for (int b = 0; b < kTileV / 8; ++b) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            *reinterpret_cast<uint32_t*>(sV.at(score_row(2 * half), b) + threadIdx.x % 4 * 4) =
                pack<Element>(dv[4 * b + 2 * half] * factor, dv[4 * b + 2 * half + 1] * factor);
          }
        }
      }
      if (slice == 0) {
        float dw[kChunk / 2];
        uint32_t ds[kChunk / 16][4];
        mma_begin(dw);
#pragma unroll
        for (int k = 0; k < kTileV / 16; ++k) {
          mma_ABt<Element, kChunk>(dw, y[k], sU, 0, 2 * k, k > 0);
        }
        mma_commit();
        __syncwarp();
        store_strip<kTileV / 8, Element>(a.dv, seg.batch, t, n, head, first_v, valid / 8, sV,
                                         warp * 16);
        mma_wait<0>(dw);
        const float unused[2] = {};
        score_gradients<Tr, true>(ds, scores, dw, unused, smem.delta, a.scale, unit);
        multiply_rows<Tr>(dk, ds, sQ);
      }
      add_state_gradient<Tr>(dk, y, smem.state, rows);
    }
    add_slices<Tr>(dk, reinterpret_cast<float*>(smem.phi.bytes));
    if (slice == 0) {
      store_gradient<Tr>(a.dk, a.partial_dk, a, seg, place.tile, head, t, n, dk,
                         1.0f / (unit * gradient));
    }
    if (Tr::kBackwardStages == 1 && i > 0) {
      __syncthreads();
      prefetch_chunk(smem, a, seg, place, i - 1);
    }
  }

  if (seg.first && a.dinitial.kv != nullptr) {
    state.store_public(a.dinitial, seg.sequence, head, first_v, valid, a.scale, 1 / unit_u);
    float* gR = a.partial_r + (seg.sequence * a.heads + head) * a.tiles * int64_t(Tr::kF) +
                place.tile * Tr::kF;
    const auto store_r = [&](int f, float r) {
      gR[public_row<Tr>(f)] = (smem.z[f] + r) / unit_u * sqrtf(feature_coefficient<Tr>(f, a.scale));
    };
    __syncthreads();
    moments.for_each(store_r);
    if (threadIdx.x == 0) store_r(Tr::kConstant, constant);
  }
}

}  // namespace based::cuda::linear
