#include <limits>
#include <type_traits>

#include "based/ops.h"
#include "primitives/dispatch.h"
#include "short_conv/backward.cuh"
#include "short_conv/forward.cuh"
#include "short_conv/states.cuh"
#include "validate.h"

namespace based::cuda {
namespace {

constexpr int kStateThreads = 256;

template <int kValue>
using Int = std::integral_constant<int, kValue>;

// fn(Int<K>{}, std::bool_constant<silu>{}) for K = 2..8 taps, which validate has made sure of.
template <int kTaps = 2, class Fn>
Status dispatch_filter(const char* op, int64_t taps, Activation activation, const Fn& fn) {
  if constexpr (kTaps < kConvMaxTaps) {
    if (taps != kTaps) return dispatch_filter<kTaps + 1>(op, taps, activation, fn);
  }
  if (taps != kTaps) {
    return make_status(StatusCode::kUnsupported, "%s: weight: expected K = 2..8 taps, got %lld", op,
                       static_cast<long long>(taps));
  }
  return activation == Activation::kSilu ? fn(Int<kTaps>{}, std::true_type{})
                                         : fn(Int<kTaps>{}, std::false_type{});
}

// Whether vectors of `bytes` of a (B, T, C) tensor are aligned, every row and token of it.
bool is_aligned(const TensorView& view, int64_t bytes, int64_t element_size) {
  if (view.rank < 0) return true;
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % bytes == 0;
  for (int i = 0; i < view.rank - 1; ++i) {
    aligned = aligned && (view.size[i] <= 1 || view.stride[i] * element_size % bytes == 0);
  }
  return aligned;
}

// fn(Int<channels per vector>{}): kVec where every tensor is aligned to that, else 1.
template <class Element, int kVec, class Fn, class... Views>
Status dispatch_vector(int64_t channels, const Fn& fn, const Views&... views) {
  constexpr int kSize = sizeof(Element), kBytes = kVec * kSize;
  const bool aligned = channels % kVec == 0 && (is_aligned(views, kBytes, kSize) && ...);
  return aligned ? fn(Int<kVec>{}) : fn(Int<1>{});
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

ConvArgs arguments(const ShortConvParams& p) {
  ConvArgs args{};
  args.x = slab(p.x), args.gate = slab(p.gate), args.out = slab(p.out);
  args.initial = slab(p.initial_state), args.final_state = slab(p.final_state);
  args.weight = slab(p.weight), args.bias = p.bias.rank < 0 ? nullptr : p.bias.data;
  args.cu_seqlens = index_vector(p.cu_seqlens);
  args.seqlen = p.x.size[1], args.channels = static_cast<int>(p.x.size[2]);
  return args;
}

int64_t sequences(const ShortConvParams& p) {
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

int64_t backward_tiles(const ShortConvParams& p) {
  return p.x.size[0] * ceil_div(p.x.size[1], ConvBackwardTile::kTokens);
}

}  // namespace

Status short_conv(const ShortConvParams& p, void*, Stream stream_) {
  const char* op = "short_conv";
  Status status = validate(p);
  if (!status.ok()) return status;
  const auto stream = static_cast<cudaStream_t>(stream_);
  ConvArgs args = arguments(p);
  const int64_t taps = p.weight.size[1], n = sequences(p);
  return dispatch_element(op, p.x.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    if (p.final_state.rank >= 0) {
      status = with_grid(op, ceil_div(n * args.channels, kStateThreads), [&](unsigned grid) {
        short_conv_final_state_kernel<Element>
            <<<grid, kStateThreads, 0, stream>>>(args, n, static_cast<int>(taps));
      });
      if (!status.ok()) return status;
    }
    const auto launch = [&](auto vec) {
      using Tile = ConvForwardTile;
      const int64_t tiles = lay_out<Element, Tile>(p, vec, args);
      return dispatch_filter(op, taps, p.activation, [&](auto k, auto silu) {
        return with_grid(op, tiles * args.channel_tiles, [&](unsigned grid) {
          short_conv_fwd_kernel<Element, k(), vec(), Tile, silu()>
              <<<grid, Tile::kThreads, 0, stream>>>(args);
        });
      });
    };
    constexpr int kVec = kConvForwardBytes / sizeof(Element);
    return dispatch_vector<Element, kVec>(args.channels, launch, p.x, p.gate, p.out);
  });
}

int64_t short_conv_backward_workspace_size(const ShortConvBackwardParams& p) {
  if (!validate(p).ok()) return 0;
  return backward_tiles(p) * (p.weight.size[1] + 1) * p.x.size[2] * sizeof(float);
}

Status short_conv_backward(const ShortConvBackwardParams& p, void* workspace, Stream stream_) {
  const char* op = "short_conv_backward";
  Status status = validate(p);
  if (!status.ok()) return status;
  const auto stream = static_cast<cudaStream_t>(stream_);
  ConvBackwardArgs args{};
  static_cast<ConvArgs&>(args) = arguments(p);
  args.dout = slab(p.dout), args.dx = slab(p.dx), args.dgate = slab(p.dgate);
  args.dfinal = slab(p.dfinal_state), args.dinitial = slab(p.dinitial_state);
  args.dweight = slab(p.dweight), args.dbias = p.dbias.rank < 0 ? nullptr : p.dbias.data;
  args.partials = static_cast<float*>(workspace), args.tiles = backward_tiles(p);
  const int64_t taps = p.weight.size[1], n = sequences(p);
  return dispatch_element(op, p.x.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    const auto launch = [&](auto vec) {
      using Tile = ConvBackwardTile;
      const int64_t tiles = lay_out<Element, Tile>(p, vec, args);
      return dispatch_filter(op, taps, p.activation, [&](auto k, auto silu) {
        status = with_grid(op, tiles * args.channel_tiles, [&](unsigned grid) {
          short_conv_bwd_kernel<Element, k(), vec(), Tile, silu()>
              <<<grid, Tile::kThreads, 0, stream>>>(args);
        });
        if (!status.ok() || p.dinitial_state.rank < 0) return status;
        return with_grid(op, ceil_div(n * args.channels, kStateThreads), [&](unsigned grid) {
          short_conv_initial_gradient_kernel<Element, k(), silu()>
              <<<grid, kStateThreads, 0, stream>>>(args, n);
        });
      });
    };
    status = dispatch_vector<Element, kConvBackwardVector>(args.channels, launch, p.x, p.gate,
                                                           p.dout, p.dx, p.dgate);
    if (!status.ok()) return status;
    return with_grid(op, ceil_div(args.channels, kConvLanes) * (taps + 1), [&](unsigned grid) {
      short_conv_reduce_kernel<Element>
          <<<grid, dim3(kConvLanes, kReduceRows), 0, stream>>>(args, static_cast<int>(taps));
    });
  });
}

Status short_conv_decode(const ShortConvDecodeParams& p, void*, Stream stream) {
  const char* op = "short_conv_decode";
  const Status status = validate(p);
  if (!status.ok()) return status;
  ConvDecodeArgs args{};
  args.x = slab(p.x), args.gate = slab(p.gate), args.out = slab(p.out);
  args.state = slab(p.conv_state), args.weight = slab(p.weight);
  args.bias = p.bias.rank < 0 ? nullptr : p.bias.data;
  args.state_indices = index_vector(p.state_indices);
  args.batch = p.x.size[0], args.slots = p.conv_state.size[0];
  args.channels = static_cast<int>(p.x.size[1]);
  return dispatch_element(op, p.x.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    return dispatch_filter(op, p.weight.size[1], p.activation, [&](auto k, auto silu) {
      const int64_t blocks = ceil_div(args.batch * args.channels, kStateThreads);
      return with_grid(op, blocks, [&](unsigned grid) {
        short_conv_decode_kernel<Element, k(), silu()>
            <<<grid, kStateThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
      });
    });
  });
}

}  // namespace based::cuda
