#include "based/ops.h"
#include "short_conv/forward.cuh"
#include "short_conv/launch.cuh"
#include "short_conv/states.cuh"

namespace based::cuda {
namespace {

// Whether a thread can have kConvVector neighbouring channels in all that a call reads and writes.
bool decodes_vectors(const ShortConvDecodeParams& p, int bytes) {
  const auto aligned = [](const TensorView& view) {
    return view.rank < 0 || reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  };
  const TensorView &weight = p.weight, &state = p.conv_state;
  return rows_are_vectors(p.x, kConvVector, bytes) &&
         rows_are_vectors(p.gate, kConvVector, bytes) &&
         rows_are_vectors(p.out, kConvVector, bytes) && aligned(p.bias) && aligned(weight) &&
         weight.stride[0] == weight.size[1] && aligned(state) && state.stride[1] == state.size[2] &&
         (state.size[0] <= 1 || state.stride[0] * bytes % 16 == 0);
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
      return dispatch_taps(op, taps, [&](auto k) {
        return dispatch_mode<vec()>(args.silu, p.gate.rank >= 0, [&](auto mode) {
          return with_grid(op, tiles * args.channel_tiles, [&](unsigned grid) {
            short_conv_fwd_kernel<Element, k(), vec(), Tile, decltype(mode)>
                <<<grid, Tile::kThreads, 0, stream>>>(args);
          });
        });
      });
    };
    return dispatch_vector<Element>(launch, p.x, p.gate, p.out);
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
  args.channels = static_cast<int>(p.x.size[1]), args.silu = p.activation == Activation::kSilu;
  return dispatch_element(op, p.x.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    return dispatch_taps(op, p.weight.size[1], [&](auto k) {
      const auto run = [&](auto vec) {
        const int64_t threads = args.batch * (args.channels / vec());
        return with_grid(op, ceil_div(threads, kConvDecodeThreads), [&](unsigned grid) {
          launch_early<ConvDecodeArgs>(short_conv_decode_kernel<Element, k(), vec()>, grid,
                                       kConvDecodeThreads, 0, static_cast<cudaStream_t>(stream),
                                       args);
        });
      };
      return decodes_vectors(p, sizeof(Element)) ? run(Int<kConvVector>{}) : run(Int<1>{});
    });
  });
}

}  // namespace based::cuda
