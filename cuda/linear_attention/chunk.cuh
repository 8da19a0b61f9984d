// The products of a chunk that forward and backward share: its tiles, the state's update and its
// reading, the pairs of tokens within the chunk, the outputs.
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

// out (64, N) (+)= phi S, kInFlight products at a time, whose A fragments hold registers.
template <class Tr, int N, bool kAsync = kHasWgmma, int kInFlight = 2, class StateTile>
__device__ __forceinline__ void read_state(float (&out)[N / 2], const TokenRows<Tr>& rows,
                                           const StateTile& sState, bool accumulate) {
  static_for<0, Tr::kF / 16>([&](auto step) {
    uint32_t phi[4];
    rows.template features<decltype(step)::value>(phi);
    mma_ABt<typename Tr::Element, N, kAsync>(out, phi, sState, 0, 2 * decltype(step)::value,
                                             accumulate || decltype(step)::value > 0);
    if constexpr (kAsync && decltype(step)::value % kInFlight == kInFlight - 1) {
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

// Where a thread's elements lie: its warp's 16 rows of the 64, and row - column of element 0.
struct Diagonal {
  int strip = __shfl_sync(0xffffffffu, int(threadIdx.x) % 128 / 32, 0);
  int below = threadIdx.x % 32 / 4 - threadIdx.x % 4 * 2;
};

// fn(k, visible) for each 16 columns k of the kPart-th kPairs; visible(half, e) says whether the
// element e of their half-th 8 columns counts.
template <Visible kVisible, int kPart, class Fn>
__device__ __forceinline__ void for_each_strip(const Diagonal& diagonal, const Fn& fn) {
  const int strip = diagonal.strip, below = diagonal.below;
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
                                        const float (&scores)[kPairs / 2], float scale, float unit,
                                        const Diagonal& diagonal = {}) {
  const float a = 0.5f * scale * scale * unit, b = scale * unit;
  for_each_strip<kVisible, kPart>(diagonal, [&](auto k, const auto& visible) {
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

}  // namespace based::cuda::linear
