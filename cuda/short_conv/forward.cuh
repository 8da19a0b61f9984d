// Short gated convolution, forward.
//   out_t = act(sum_j weight_j x_{t-K+1+j} + bias) * gate_t
// Memory-bound: x and gate are read once (the K-1 inputs before a run come from the cache), out is
// written once.
#pragma once

#include "short_conv/convolution.cuh"

namespace based::cuda {

// One thread per kVec channels and run of tokens. A run that crosses from one packed sequence into
// the next starts again there with that sequence's initial state.
template <class Element, int kTaps, int kVec, class Tile, class Mode>
__global__ void __launch_bounds__(Tile::kThreads) short_conv_fwd_kernel(ConvArgs args) {
  const ConvPlace place = conv_place<Tile, kVec>(args);
  if (place.channel >= args.channels) return;
  const Element* gX = row_of<Element>(args.x, place.row, place.channel);
  const bool silu = Mode::silu(args), gated = Mode::gated(args);
  Convolution<Element, kTaps, kVec> conv;
  conv.load_filter(args, place.channel);

  for (int64_t t = place.begin; t < place.end;) {
    const Span span = span_at(args, place.row, t);
    const int count = static_cast<int>(min(span.end, place.end) - t);
    conv.start(args, gX, span, t, place.channel);
    const Element* next_x = gX + t * args.x.stride1;
    const Element* next_gate = token_of<Element>(args.gate, place.row, t, place.channel);
    Element* next_out = mutable_token_of<Element>(args.out, place.row, t, place.channel);
    for (int left = count; left > 0; left -= Tile::kAhead) {
      Vector<Element, kVec> x[Tile::kAhead], gate[Tile::kAhead];
#pragma unroll
      for (int u = 0; u < Tile::kAhead; ++u) {
        if (u < left) x[u] = load_vector<kVec>(next_x);
        if (u < left && gated) gate[u] = load_vector<kVec>(next_gate);
        next_x += args.x.stride1, next_gate += args.gate.stride1;
      }
#pragma unroll
      for (int u = 0; u < Tile::kAhead; ++u) {
        conv.push(x[u]);
        float out[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          out[i] = conv.sum(i);
          if (silu) out[i] *= sigmoid(out[i]);
          if (gated) out[i] *= gate[u][i];
        }
        if (u < left) store_vector(next_out, out);
        next_out += args.out.stride1;
      }
    }
    t += count;
  }
}

}  // namespace based::cuda
