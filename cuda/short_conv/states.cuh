// The final state, and decoding: small kernels that walk no tokens.
#pragma once

#include "primitives/decode_row.cuh"
#include "primitives/early_launch.cuh"
#include "short_conv/convolution.cuh"

namespace based::cuda {

// final_state_n = the last K-1 inputs of sequence n, which may reach back into its initial state.
template <class Element>
__global__ void short_conv_final_state_kernel(ConvArgs args, int64_t rows, int taps) {
  int64_t n;
  int channel;
  if (!state_place(args, rows, n, channel)) return;
  const Span span = state_span(args, n);
  const bool packed = args.cu_seqlens.data != nullptr;
  const Element* gX = row_of<Element>(args.x, packed ? 0 : n, channel);
  const Element* gInitial = state_of<Element>(args.initial, n, channel);
  Element* gFinal = state_of<Element>(args.final_state, n, channel);
  for (int i = 0; i < taps - 1; ++i) {
    const int64_t s = span.end - (taps - 1) + i;
    Element value = from_float<Element>(absent(span));
    if (s >= span.begin) {
      value = gX[s * args.x.stride1];
    } else if (args.initial.data != nullptr && span.n >= 0) {
      value = gInitial[s - span.begin + taps - 1];
    }
    gFinal[i] = value;
  }
}

// One token per row: out from the state and x, then x is shifted into the state. A skipped row gets
// 0, one whose slot does not exist NaN.
struct ConvDecodeArgs {
  Slab x, gate, out;  // (B, C): stride0 from row to row
  Slab state;         // (slots, C, K-1), updated in place
  Slab weight;        // (C, K)
  const void* bias;   // (C,)
  IndexVector state_indices;
  int64_t batch, slots;
  int channels;
  bool silu;
};

// kCount elements of each of kVec channels, which follow each other in memory; read as 16 bytes at
// a time where they are multiples of that.
template <class Element, int kCount, int kVec>
struct ChannelRows {
  static constexpr int kWide = 16 / sizeof(Element), kAll = kCount * kVec;
  static constexpr int kWidth = kVec > 1 && kAll % kWide == 0 ? kWide : kVec;
  Vector<Element, kWidth> vectors[kAll / kWidth];

  __device__ __forceinline__ explicit ChannelRows(const Element* from) {
#pragma unroll
    for (int n = 0; n < kAll / kWidth; ++n) vectors[n] = load_vector<kWidth>(from + n * kWidth);
  }
  __device__ __forceinline__ float at(int channel, int j) const {
    const int place = channel * kCount + j;
    return vectors[place / kWidth][place % kWidth];
  }
};

// A thread has kVec channels of a row. Bound by memory, and by its latency: all that does not
// depend on the slot is on its way before the slot is known.
template <class Element, int kTaps, int kVec>
__global__ void __launch_bounds__(kConvDecodeThreads)
    short_conv_decode_kernel(const __grid_constant__ ConvDecodeArgs args) {
  let_next_kernel_start();
  const int64_t index = int64_t(blockIdx.x) * kConvDecodeThreads + threadIdx.x;
  const int vectors = args.channels / kVec;
  const int64_t b = index / vectors;
  const int channel = static_cast<int>(index - b * vectors) * kVec;
  wait_for_earlier_kernels();
  if (b >= args.batch) return;
  const DecodeRow row = decode_row(args.state_indices, b, args.slots);
  const auto x = load_vector<kVec>(row_of<Element>(args.x, b, channel));
  const ChannelRows<Element, kTaps, kVec> weight(row_of<Element>(args.weight, channel, 0));
  Vector<Element, kVec> gate, bias;
  const bool gated = args.gate.data != nullptr, biased = args.bias != nullptr;
  if (gated) gate = load_vector<kVec>(row_of<Element>(args.gate, b, channel));
  if (biased) bias = load_vector<kVec>(static_cast<const Element*>(args.bias) + channel);
  Element* gOut = mutable_token_of<Element>(args.out, b, 0, channel);
  float out[kVec];
  if (row.kind != RowKind::kRun) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] = filler(row.kind);
    return store_vector(gOut, out);
  }
  Element* gState = state_of<Element>(args.state, row.slot, channel);
  using State = ChannelRows<Element, kTaps - 1, kVec>;
  const State state(gState);
  const auto input = [&](int i, int j) { return j < kTaps - 1 ? state.at(i, j) : x[i]; };
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    out[i] = biased ? bias[i] : 0.0f;
#pragma unroll
    for (int j = 0; j < kTaps; ++j) out[i] += weight.at(i, j) * input(i, j);
  }
  if (args.silu) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] *= sigmoid(out[i]);
  }
  if (gated) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) out[i] *= gate[i];
  }
  store_vector(gOut, out);
#pragma unroll
  for (int n = 0; n < State::kAll / State::kWidth; ++n) {
    float shifted[State::kWidth];
#pragma unroll
    for (int i = 0; i < State::kWidth; ++i) {
      const int place = n * State::kWidth + i;
      shifted[i] = input(place / (kTaps - 1), place % (kTaps - 1) + 1);
    }
    store_vector(gState + n * State::kWidth, shifted);
  }
}

}  // namespace based::cuda
