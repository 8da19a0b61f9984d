// Params -> kernel arguments and grids, shared by the launchers of the short convolution.
#pragma once

#include <limits>
#include <type_traits>

#include "primitives/dispatch.h"
#include "short_conv/convolution.cuh"
#include "validate.h"

namespace based::cuda {

constexpr int kStateThreads = 256;  // of the kernels with a thread per row and channel

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// fn(Int<K>{}) for K = 2..8 taps, which validate has made sure of.
template <int kTaps = 2, class Fn>
Status dispatch_taps(const char* op, int64_t taps, const Fn& fn) {
  if (taps == kTaps) return fn(Int<kTaps>{});
  if constexpr (kTaps < kConvMaxTaps) return dispatch_taps<kTaps + 1>(op, taps, fn);
  return make_status(StatusCode::kUnsupported, "%s: weight: expected K = 2..8 taps, got %lld", op,
                     static_cast<long long>(taps));
}

// fn(ConvMode{}): one that is known when compiling for kVec > 1.
template <int kVec, class Fn>
Status dispatch_mode(bool silu, bool gated, const Fn& fn) {
  if constexpr (kVec == 1) {
    return fn(ConvMode<>{});
  } else if (silu) {
    return gated ? fn(ConvMode<1, 1>{}) : fn(ConvMode<1, 0>{});
  } else {
    return gated ? fn(ConvMode<0, 1>{}) : fn(ConvMode<0, 0>{});
  }
}

// fn(Int<channels per vector>{}): kConvVector where the rows of all tensors allow it, else 1.
template <class Element, class Fn, class... Views>
Status dispatch_vector(const Fn& fn, const Views&... views) {
  const bool wide = (rows_are_vectors(views, kConvVector, sizeof(Element)) && ...);
  return wide ? fn(Int<kConvVector>{}) : fn(Int<1>{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline ConvArgs arguments(const ShortConvParams& p) {
  ConvArgs args{};
  args.x = slab(p.x), args.gate = slab(p.gate), args.out = slab(p.out);
  args.initial = slab(p.initial_state), args.final_state = slab(p.final_state);
  args.weight = slab(p.weight), args.bias = p.bias.rank < 0 ? nullptr : p.bias.data;
  args.cu_seqlens = index_vector(p.cu_seqlens);
  args.silu = p.activation == Activation::kSilu;
  args.seqlen = p.x.size[1], args.channels = static_cast<int>(p.x.size[2]);
  return args;
}

inline int64_t sequences(const ShortConvParams& p) {
  return p.cu_seqlens.rank < 0 ? p.x.size[0] : p.cu_seqlens.size[0] - 1;
}

// Blocks of a grid as what a launch takes; a Status when there are too many.
template <class Fn>
Status with_grid(const char* op, int64_t blocks, const Fn& launch) {
  if (blocks <= 0) return {};
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return make_status(StatusCode::kUnsupported,
                       "%s: x: expected fewer than 2^31 blocks of work, got more", op);
  }
  launch(static_cast<unsigned>(blocks));
  return launch_status(op);
}

// Tiles of the whole batch; args gets the layout of the grid, and of the weights.
template <class Element, class Tile>
int64_t lay_out(const ShortConvParams& p, int vec, ConvArgs& args) {
  args.row_tiles = ceil_div(args.seqlen, Tile::kTokens);
  args.channel_tiles = static_cast<int>(ceil_div(args.channels, vec * kConvLanes));
  args.dense_weight = p.weight.stride[0] == p.weight.size[1] &&
                      reinterpret_cast<uintptr_t>(p.weight.data) % (vec * sizeof(Element)) == 0;
  return p.x.size[0] * args.row_tiles;
}

}  // namespace based::cuda
