// The final state, and decoding: small kernels of one thread per row and channel.
#pragma once

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

template <class Element, int kTaps>
__global__ void short_conv_decode_kernel(ConvDecodeArgs args) {
  let_next_kernel_start();
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = index / args.channels;
  const int channel = static_cast<int>(index % args.channels);
  if (row >= args.batch) return;
  const int64_t slot = args.state_indices.data == nullptr ? row : args.state_indices[row];
  Element* gOut = mutable_token_of<Element>(args.out, row, 0, channel);
  if (slot < 0 || slot >= args.slots) {
    *gOut = from_float<Element>(absent({slot == -1 ? 0 : -1, 0, 0}));
    return;
  }
  const Element* gWeight = row_of<Element>(args.weight, channel, 0);
  Element* gState = state_of<Element>(args.state, slot, channel);
  Element inputs[kTaps];
#pragma unroll
  for (int j = 0; j < kTaps - 1; ++j) inputs[j] = gState[j];
  inputs[kTaps - 1] = *row_of<Element>(args.x, row, channel);
  float sum =
      args.bias == nullptr ? 0.0f : to_float(static_cast<const Element*>(args.bias)[channel]);
#pragma unroll
  for (int j = 0; j < kTaps; ++j) sum += to_float(gWeight[j]) * to_float(inputs[j]);
  if (args.silu) sum *= sigmoid(sum);
  if (args.gate.data != nullptr) sum *= to_float(*row_of<Element>(args.gate, row, channel));
  *gOut = from_float<Element>(sum);
#pragma unroll
  for (int j = 0; j < kTaps - 1; ++j) gState[j] = inputs[j + 1];
}

}  // namespace based::cuda
