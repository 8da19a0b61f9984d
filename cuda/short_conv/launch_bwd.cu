#include "based/ops.h"
#include "short_conv/backward.cuh"
#include "short_conv/launch.cuh"

namespace based::cuda {
namespace {

int64_t backward_tiles(const ShortConvParams& p) {
  return p.x.size[0] * ceil_div(p.x.size[1], ConvBackwardTile::kTokens);
}

}  // namespace

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
      return dispatch_taps(op, taps, [&](auto k) {
        return dispatch_mode<vec()>(args.silu, p.gate.rank >= 0, [&](auto mode) {
          return with_grid(op, tiles * args.channel_tiles, [&](unsigned grid) {
            short_conv_bwd_kernel<Element, k(), vec(), Tile, decltype(mode)>
                <<<grid, Tile::kThreads, 0, stream>>>(args);
          });
        });
      });
    };
    status = dispatch_vector<Element>(launch, p.x, p.gate, p.dout, p.dx, p.dgate);
    if (status.ok() && p.dinitial_state.rank >= 0) {
      status = dispatch_taps(op, taps, [&](auto k) {
        return with_grid(op, ceil_div(n * args.channels, kStateThreads), [&](unsigned grid) {
          short_conv_initial_gradient_kernel<Element, k()>
              <<<grid, kStateThreads, 0, stream>>>(args, n);
        });
      });
    }
    if (!status.ok()) return status;
    return with_grid(op, ceil_div(args.channels, kConvLanes) * (taps + 1), [&](unsigned grid) {
      short_conv_reduce_kernel<Element>
          <<<grid, dim3(kConvLanes, kReduceRows), 0, stream>>>(args, static_cast<int>(taps));
    });
  });
}

}  // namespace based::cuda
