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

#include "linear_attention/increments.cuh"

namespace based::cuda::linear {

constexpr int kGradientRows =
    kTileV + 16;  // rows of the state's copy that dphi reads: k of a product

__device__ __forceinline__ int64_t token_index(const Arguments& a, const Segment& seg, int tile,
                                               int head, int64_t t) {
  const int64_t batch = a.cu_seqlens == nullptr ? a.sequences : 1;
  return ((tile * batch + seg.batch) * a.seqlen + t) * a.heads + head;
}

// delta as an operand: rounded, and what the rounding left.
template <class Element>
__device__ __forceinline__ uint32_t two_parts(float x) {
  const float high = unpack<Element>(pack<Element>(x, 0.0f)).x;
  return pack<Element>(high, x - high);
}

// 1 / den and delta of the thread's row of a chunk of n tokens, zeros where there is none.
__device__ __forceinline__ float2 load_scalars(const Arguments& a, const Segment& seg, int tile,
                                               int head, int64_t t, int n) {
  const int row = threadIdx.x % kChunk;
  if (row >= n) return {0.0f, 0.0f};
  if (!a.normalize) return {1.0f, 0.0f};
  const int64_t index = token_index(a, seg, tile, head, t + row);
  return {a.inverse_den[index], a.delta[index]};
}

// The rows of a tile of dout become u = dout / den times unit, rounded; the columns behind them
// delta times unit in two parts. sDelta: the same delta in fp32.
template <class Tr>
__device__ __forceinline__ void scale_gradients(ValueTile& tile, float* sDelta, float2 scalars,
                                                float unit) {
  using Element = typename Tr::Element;
  const int row = threadIdx.x % kChunk;
  const float inverse = scalars.x * unit, delta = scalars.y * unit;
#pragma unroll
  for (int block = threadIdx.x / kChunk; block < kTileV / 8; block += kThreads / kChunk) {
    uint4 x = *reinterpret_cast<const uint4*>(tile.at(row, block));
    uint32_t* words = reinterpret_cast<uint32_t*>(&x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 value = unpack<Element>(words[i]);
      words[i] = pack<Element>(value.x * inverse, value.y * inverse);
    }
    *reinterpret_cast<uint4*>(tile.at(row, block)) = x;
  }
  if (threadIdx.x < kChunk) {
    *reinterpret_cast<uint4*>(tile.at(row, kTileV / 8)) =
        make_uint4(two_parts<Element>(delta), 0, 0, 0);
    sDelta[row] = delta;
  }
}

// dx += J(x)^T dphi for the groups from kFirst on; dx (16, D) a warp and dphi (16, N) in the
// accumulators' layout. x_j x_{j+r} gives x_{j+r} to dx_j in place and x_j to dx_{j+r} by a product
// with a permutation.
template <class Tr, int kFirst, int N, class TokenRows>
__device__ __forceinline__ void add_feature_gradient(float (&dx)[Tr::D / 2],
                                                     const float (&dphi)[N / 2],
                                                     const TokenRows& rows) {
  using Element = typename Tr::Element;
  constexpr int D = Tr::D;
  const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  static_for<kFirst / 2, kFirst / 2 + N / 16>([&](auto step) {
    constexpr int kStep = decltype(step)::value;
    uint32_t turned[4] = {}, a[4] = {};
    if constexpr (TokenRows::turns(kStep)) rows.template rotated<kStep>(turned);
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
    if constexpr (TokenRows::turns(kStep)) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // row k goes to column k + j + rotation
          const Group group = feature_group<D>(2 * kStep + half);
          const int shift = (8 * n - group.j - group.rotation + 2 * D) % D;  // often the same
          const int t = (g - 2 * c + shift + D) % D;
          b[half] = t == 0 ? one<Element>() : t == 1 ? one<Element>() << 16 : 0;
        }
        warp_mma<Element>(dx + 4 * n, a, b[0], b[1]);
      }
    }
  });
}

// dx += J(x)^T (state times y); y (64, 80) as A fragments.
template <class Tr, class StateTile, class TokenRows>
__device__ __forceinline__ void add_state_gradient(float (&dx)[Tr::D / 2],
                                                   const uint32_t (&y)[kGradientRows / 16][4],
                                                   const StateTile& sState, const TokenRows& rows) {
  constexpr int N = Tr::kGradientN;
  static_assert(Tr::kF % N == 0 && N % 16 == 0);
  static_for<0, Tr::kF / N>([&](auto part) {
    constexpr int kFirst = decltype(part)::value * (N / 8);
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
}

// A warp's rows of dq or dk, or of a tile's share of them; first_row: of its warpgroup.
template <class Tr>
__device__ __forceinline__ void store_gradient(const Rows& to, float* partial, const Arguments& a,
                                               const Segment& seg, int tile, int head, int64_t t,
                                               int n, const float (&dx)[Tr::D / 2], float unit,
                                               int first_row) {
#pragma unroll
  for (int i = 0; i < Tr::D / 8; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + acc_row(2 * half), column = 8 * i + acc_column(0);
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

// u = dout / den of a warp's rows and, behind it, their delta, as A fragments times `gradient`;
// out: the outputs' numerators and denominators times `unit`. Leaves 1 / den and delta in memory
// too. first_row: of the warpgroup in the tile of dout.
template <class Tr, class Tile>
__device__ __forceinline__ void read_gradients(uint32_t (&u)[kGradientRows / 16][4],
                                               float (&delta)[2], const float (&out)[kExtended / 2],
                                               const Tile& sU, const Arguments& a,
                                               const Segment& seg, int tile, int head, int64_t t,
                                               int n, float unit, float gradient, int first_row) {
  using Element = typename Tr::Element;
  const int warp_row = first_row + threadIdx.x % 128 / 32 * 16;
#pragma unroll
  for (int k = 0; k < kTileV / 16; ++k) load_a(u[k], sU, warp_row, 2 * k);
  const int quad = threadIdx.x % 32 / 4 * 4;  // its first lane has the denominators
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + acc_row(2 * half);
    const float den = __shfl_sync(0xffffffffu, out[kTileV / 2 + 2 * half], quad);
    const float inverse = row < n ? 1.0f / den : 0.0f;  // den and out carry unit
    const float factor = a.normalize ? inverse * unit * gradient : float(row < n);
    float dot = 0;
#pragma unroll
    for (int b = 0; b < kTileV / 8; ++b) {
      uint32_t& word = u[b / 2][b % 2 * 2 + half];
      const float2 d = unpack<Element>(word);
      word = pack<Element>(d.x * factor, d.y * factor);
      const float2 rounded = unpack<Element>(word);
      dot = fmaf(rounded.x, out[4 * b + 2 * half], dot);
      dot = fmaf(rounded.y, out[4 * b + 2 * half + 1], dot);
    }
    dot += __shfl_xor_sync(0xffffffffu, dot, 1);
    dot += __shfl_xor_sync(0xffffffffu, dot, 2);
    delta[half] = a.normalize && row < n ? -dot * inverse : 0.0f;
    if (threadIdx.x % 4 == 0 && row < n && a.normalize) {
      const int64_t index = token_index(a, seg, tile, head, t + row);
      a.inverse_den[index] = inverse * unit;
      a.delta[index] = delta[half] / gradient;
    }
    u[kTileV / 16][half] = threadIdx.x % 4 == 0 ? two_parts<Element>(delta[half]) : 0;
    u[kTileV / 16][2 + half] = 0;
  }
}

template <class Tr>
struct BackwardSmem {
  using StateTile = CoreTile<kGradientRows, Tr::kF>;
  static constexpr int kStages = Tr::kBackwardStages;
  union {
    alignas(128) PhiTile<Tr> phi;
    typename Tr::Element scratch[kThreads / 32][16 * kPairs];  // of the NaN paths
  };
  StateTile state;
  TokenTile<Tr> q[kStages], k[kStages];
  ValueTile v[kStages], u[kStages];  // u: dout, then u
  char transposed[kThreads / 32][TokenRows<Tr>::kTransposedBytes];
  float z[Tr::kF];
  float delta[kChunk];
};

template <class Tr>
__device__ __forceinline__ void prefetch_chunk(BackwardSmem<Tr>& smem, const Arguments& a,
                                               const Segment& seg, const Place& place, int done) {
  using Element = typename Tr::Element;
  constexpr int kBlocks = Tr::D / 8;
  const int64_t t = seg.begin + done;
  const int n = int(seg.end - t), stage = done / kChunk % Tr::kBackwardStages;
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v) / 8;
  load_tile<kBlocks, Element>(smem.q[stage], a.q, seg.batch, t, n, head, 0, kBlocks);
  load_tile<kBlocks, Element>(smem.k[stage], a.k, seg.batch, t, n, head, 0, kBlocks);
  load_tile<kTileV / 8, Element>(smem.v[stage], a.v, seg.batch, t, n, head, first_v, valid);
  load_tile<kTileV / 8, Element>(smem.u[stage], a.dout, seg.batch, t, n, head, first_v, valid);
  cp_async_commit();
}

template <class Tr>
__device__ __forceinline__ void prepare_tiles(BackwardSmem<Tr>& smem) {
  for (int i = 0; i < Tr::kBackwardStages; ++i) {
    zero_padding<Tr>(smem.q[i]), zero_padding<Tr>(smem.k[i]);
    store_ones<typename Tr::Element>(smem.v[i], kChunk);
  }
  for (int i = threadIdx.x; i < Tr::kGroups * 16; i += kThreads) {  // rows below the state's
    *reinterpret_cast<uint4*>(smem.state.at(kTileV + i % 16, i / 16)) = make_uint4(0, 0, 0, 0);
  }
}

// Row `row` of the state's copy, feature f.
template <class Tr, class StateTile>
__device__ __forceinline__ void store_row(StateTile& sState, int row, int f, float value) {
  *reinterpret_cast<typename Tr::Element*>(sState.at(row, f / 8) + f % 8 * 2) =
      from_float<typename Tr::Element>(value);
}

// dw (1 + s) scale unit of the visible pairs, as A fragments. dw still lacks delta: of the row's
// token, or (kUpper) of the column's.
template <class Tr, Visible kVisible, int kPart, class Delta>
__device__ __forceinline__ void score_gradients(uint32_t (&ds)[kPairs / 16][4],
                                                const float (&scores)[kPairs / 2],
                                                const float (&dw)[kPairs / 2], const Delta& delta,
                                                float scale, float unit,
                                                const Diagonal& diagonal = {}) {
  const float a = scale * scale * unit, b = scale * unit;
  for_each_strip<kVisible, kPart>(diagonal, [&](auto k, const auto& visible) {
    constexpr int kStrip = decltype(k)::value;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float value[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = 8 * kStrip + 4 * half + e;
        const float slope = fmaf(scores[i], a, b);
        value[e] = visible(half, e) ? (dw[i] + delta(2 * kStrip + half, e)) * slope : 0.0f;
      }
      ds[kStrip][2 * half] = pack<typename Tr::Element>(value[0], value[1]);
      ds[kStrip][2 * half + 1] = pack<typename Tr::Element>(value[2], value[3]);
    }
  });
}

// dx (16, D) a warp += ds (16, kPairs) times rows first ... of x.
template <class Tr, class Tile>
__device__ __forceinline__ void multiply_rows(float (&dx)[Tr::D / 2],
                                              const uint32_t (&ds)[kPairs / 16][4], const Tile& sX,
                                              int first) {
#pragma unroll
  for (int k = 0; k < kPairs / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Tr::D / 8; n += 2) {
      uint32_t b[4];
      load_b(b, sX, first + 16 * k, n);
      warp_mma<typename Tr::Element>(dx + 4 * n, ds[k], b[0], b[1]);
      if (n + 1 < Tr::D / 8) warp_mma<typename Tr::Element>(dx + 4 * n + 4, ds[k], b[2], b[3]);
    }
  }
}

// scores and dw (64, kPairs) of a warpgroup's rows with rows first ... of the other side.
template <class Tr, class XTile>
__device__ __forceinline__ void multiply_pairs(float (&scores)[kPairs / 2], float (&dw)[kPairs / 2],
                                               const TokenRows<Tr>& rows, const XTile& sX,
                                               const uint32_t (&y)[kGradientRows / 16][4],
                                               const ValueTile& sY, int first) {
  mma_begin(scores, dw);
  multiply_scores<Tr>(scores, rows, sX, first);
#pragma unroll
  for (int k = 0; k < kTileV / 16; ++k) {
    mma_ABt<typename Tr::Element, kPairs>(dw, y[k], sY, first, 2 * k, k > 0);
  }
  mma_commit();
  mma_wait<0>(scores, dw);
}

}  // namespace based::cuda::linear
