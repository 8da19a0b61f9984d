// Short gated convolution, forward.
//   out_t = act(sum_j weight_j x_{t-K+1+j} + bias) * gate_t
// Memory-bound: x and gate are read once (the K-1 inputs before a run come from the cache), out is
// written once.
#pragma once

#include "short_conv/convolution.cuh"

namespace based::cuda {

// One thread per kVec channels and run of tokens. A run that crosses from one packed sequence into
// the next starts again there with that sequence's initial state.
template <class Element, int kTaps, int kVec, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) short_conv_fwd_kernel(ConvArgs args) {
  const ConvPlace place = conv_place<Tile, kVec>(args);
  if (place.channel >= args.channels) return;
  const Element* gX = row_of<Element>(args.x, place.row, place.channel);
  const Element* gGate = row_of<Element>(args.gate, place.row, place.channel);
  Element* gOut = mutable_row_of<Element>(args.out, place.row, place.channel);
  const bool gated = args.gate.data != nullptr;
  Convolution<Element, kTaps, kVec> conv;
  conv.load_filter(args, place.channel);

  for (int64_t t = place.begin; t < place.end;) {
    const Span span = span_at(args, place.row, t);
    const int64_t end = min(span.end, place.end);
    conv.start(args, gX, span, t, place.channel);
    for (; t < end; t += Tile::kAhead) {
      Vector<Element, kVec> x[Tile::kAhead] = {}, gate[Tile::kAhead] = {};
#pragma unroll
      for (int u = 0; u < Tile::kAhead; ++u) {
        if (t + u >= end) continue;
        x[u] = load_vector<kVec>(gX + (t + u) * args.x.stride1);
        if (gated) gate[u] = load_vector<kVec>(gGate + (t + u) * args.gate.stride1);
      }
#pragma unroll
      for (int u = 0; u < Tile::kAhead; ++u) {
        conv.push(x[u]);
        float out[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          const float sum = conv.sum(i);
          out[i] = args.silu ? sum * sigmoid(sum) : sum;
          if (gated) out[i] *= to_float(gate[u].values[i]);
        }
        if (t + u < end) store_vector(gOut + (t + u) * args.out.stride1, out);
      }
    }
    t = end;
  }
}

}  // namespace based::cuda
