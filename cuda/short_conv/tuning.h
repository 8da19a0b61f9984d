// How the short-convolution kernels cut their work.
#pragma once

namespace based::cuda {

constexpr int kConvMaxTaps = 8;
constexpr int kConvLanes = 32;  // of a warp, each with a vector of channels
constexpr int kConvDecodeThreads = 128;
constexpr int kConvVector = 4;  // channels; more of them cost the registers that hide latency

// A thread walks kRun tokens of its channels, kAhead of them loaded before they are used; a block
// is kGroups such runs, one after the other in time.
template <int kRun_, int kAhead_, int kGroups_>
struct ConvTile {
  static constexpr int kRun = kRun_, kAhead = kAhead_, kGroups = kGroups_;
  static constexpr int kThreads = kGroups * kConvLanes, kTokens = kGroups * kRun;
  static_assert(kRun % kAhead == 0, "a run is whole steps");
};

using ConvForwardTile = ConvTile<16, 4, 4>;
using ConvBackwardTile = ConvTile<64, 4, 4>;

// Blocks of the backward that an SM has to hold: few taps then fit, at 128 registers a thread.
constexpr int conv_backward_blocks(int taps) { return taps <= 3 ? 4 : 1; }

}  // namespace based::cuda
