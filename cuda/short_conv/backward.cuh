// Short gated convolution, backward. With c_t the convolution, a = act(c) and g_t = dL/dc_t:
//   dgate_t = dout_t a_t,  g_t = dout_t gate_t act'(c_t),  dx_s = sum_j weight_j g_{s+K-1-j},
//   dweight_j = sum_t g_t x_{t-K+1+j},  dbias = sum_t g_t
// Memory-bound: x, gate and dout are read once, dx and dgate written once; c is computed again.
// dweight and dbias are summed per thread, per block, then over blocks in a fixed order.
#pragma once

#include "short_conv/convolution.cuh"

namespace based::cuda {

// What one token of one channel contributes: dL/dconvolution, and the gradient of the gate.
struct TokenGradient {
  float g, dgate;
};

__device__ __forceinline__ TokenGradient token_gradient(float sum, float dout, float gate,
                                                        bool silu) {
  if (!silu) return {dout * gate, dout * sum};
  const float s = sigmoid(sum), a = sum * s;
  return {dout * gate * (s + a * (1.0f - s)), dout * a};
}

// One thread per kVec channels and run of tokens; it computes g of the K-1 tokens behind the run
// again, because dx of its last tokens needs them.
template <class Element, int kTaps, int kVec, class Mode>
struct ConvGradient {
  Convolution<Element, kTaps, kVec> conv;
  float g[kTaps][kVec];              // of the last K tokens
  float sums[kTaps + 1][kVec] = {};  // dweight and dbias

  // dx and dgate of tokens [begin, end) of a span.
  template <int kAhead>
  __device__ __forceinline__ void run(const ConvBackwardArgs& args, const Span& span, int64_t row,
                                      int64_t begin, int64_t end, int channel) {
    conv.start(args, row_of<Element>(args.x, row, channel), span, begin, channel);
    const Element* next_x = token_of<Element>(args.x, row, begin, channel);
    const Element* next_gate = token_of<Element>(args.gate, row, begin, channel);
    const Element* next_dout = token_of<Element>(args.dout, row, begin, channel);
    Element* next_dgate = mutable_token_of<Element>(args.dgate, row, begin, channel);
    Element* next_dx = mutable_token_of<Element>(args.dx, row, begin - (kTaps - 1), channel);
    const bool gated = Mode::gated(args), wants_dgate = gated && args.dgate.data != nullptr;
    // Tokens are counted from begin: `count` to work on, of `behind` to walk, of which `known` are
    // in the sequence.
    const int count = static_cast<int>(end - begin), behind = count + kTaps - 1;
    const int known = static_cast<int>(min(span.end - begin, int64_t(behind)));

    for (int first = 0; first < behind; first += kAhead) {
      Vector<Element, kVec> x[kAhead], gate[kAhead], dout[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        if (first + u < known) {
          x[u] = load_vector<kVec>(next_x);
          dout[u] = load_vector<kVec>(next_dout);
          if (gated) gate[u] = load_vector<kVec>(next_gate);
        }
        next_x += args.x.stride1, next_dout += args.dout.stride1, next_gate += args.gate.stride1;
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int t = first + u, s = t - (kTaps - 1);
        conv.push(x[u]);
        float dgate[kVec], dx[kVec];
        push_gradient(args, t < known, span, dout[u], gate[u], dgate);
        if (t < count) {
          add_weight_gradient();
          if (wants_dgate) store_vector(next_dgate, dgate);
        }
        if (s >= 0 && s < count) {
          input_gradient(args, span, begin + t, channel, dx);
          store_vector(next_dx, dx);
        }
        next_dgate += args.dgate.stride1, next_dx += args.dx.stride1;
      }
    }
  }

  // The token pushed last into conv is next; its g is 0 when it is not in the sequence.
  __device__ __forceinline__ void push_gradient(const ConvBackwardArgs& args, bool known,
                                                const Span& span, const Vector<Element, kVec>& dout,
                                                const Vector<Element, kVec>& gate,
                                                float (&dgate)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
#pragma unroll
      for (int j = 1; j < kTaps; ++j) g[j - 1][i] = g[j][i];
      const TokenGradient token = token_gradient(
          conv.sum(i), dout[i], Mode::gated(args) ? gate[i] : 1.0f, Mode::silu(args));
      g[kTaps - 1][i] = known ? token.g : absent(span);
      dgate[i] = token.dgate;
    }
  }

  __device__ __forceinline__ void add_weight_gradient() {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
#pragma unroll
      for (int j = 0; j < kTaps; ++j) sums[j][i] += g[kTaps - 1][i] * conv.window[j][i];
      sums[kTaps][i] += g[kTaps - 1][i];
    }
  }

  // dx of token t - (K-1), whose last reader t was pushed last. When t lies behind the sequence,
  // the final state keeps that token, and its gradient is added.
  __device__ __forceinline__ void input_gradient(const ConvBackwardArgs& args, const Span& span,
                                                 int64_t t, int channel, float (&dx)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dx[i] = conv.weight[0][i] * g[kTaps - 1][i];
#pragma unroll
      for (int j = 1; j < kTaps; ++j) dx[i] += conv.weight[j][i] * g[kTaps - 1 - j][i];
    }
    if (t < span.end || span.n < 0 || args.dfinal.data == nullptr) return;
    const Element* gFinal = state_of<Element>(args.dfinal, span.n, channel) + (t - span.end);
#pragma unroll
    for (int i = 0; i < kVec; ++i) dx[i] += to_float(gFinal[i * args.dfinal.stride1]);
  }
};

template <class Element, int kTaps, int kVec, class Tile, class Mode>
__global__ void __launch_bounds__(Tile::kThreads, conv_backward_blocks(kTaps))
    short_conv_bwd_kernel(ConvBackwardArgs args) {
  const ConvPlace place = conv_place<Tile, kVec>(args);
  ConvGradient<Element, kTaps, kVec, Mode> gradient;
  if (place.channel < args.channels) {
    gradient.conv.load_filter(args, place.channel);
    for (int64_t t = place.begin; t < place.end;) {
      const Span span = span_at(args, place.row, t);
      const int64_t end = min(span.end, place.end);
      gradient.template run<Tile::kAhead>(args, span, place.row, t, end, place.channel);
      t = end;
    }
  }

  // The block's sums, group by group.
  __shared__ float s_sums[Tile::kGroups]
                         [kVec * kConvLanes];  // channel lane kVec + i at i 32 + lane
  const int lane = threadIdx.x % kConvLanes, group = threadIdx.x / kConvLanes;
  const int64_t tile = blockIdx.x / unsigned(args.channel_tiles);
  const int first = blockIdx.x % unsigned(args.channel_tiles) * kConvLanes * kVec;
#pragma unroll
  for (int j = 0; j <= kTaps; ++j) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) s_sums[group][i * kConvLanes + lane] = gradient.sums[j][i];
    __syncthreads();
    for (int c = threadIdx.x; c < kVec * kConvLanes; c += Tile::kThreads) {
      const int channel = first + c;
      float sum = 0.0f;
      for (int k = 0; k < Tile::kGroups; ++k) {
        sum += s_sums[k][c % kVec * kConvLanes + c / kVec];
      }
      if (channel < args.channels) {
        args.partials[(tile * (kTaps + 1) + j) * args.channels + channel] = sum;
      }
    }
    __syncthreads();
  }
}

// dinitial_n: the gradient of the K-1 inputs before sequence n, from g of its first K-1 tokens.
template <class Element, int kTaps>
__global__ void short_conv_initial_gradient_kernel(ConvBackwardArgs args, int64_t rows) {
  int64_t n;
  int channel;
  if (!state_place(args, rows, n, channel)) return;
  const Span span = state_span(args, n);
  const int64_t row = args.cu_seqlens.data != nullptr ? 0 : n;
  const Element* gX = row_of<Element>(args.x, row, channel);
  const Element* gGate = row_of<Element>(args.gate, row, channel);
  const Element* gDout = row_of<Element>(args.dout, row, channel);
  Element* gDinitial = state_of<Element>(args.dinitial, n, channel);
  const bool gated = args.gate.data != nullptr;
  ConvGradient<Element, kTaps, 1, ConvMode<>> gradient;
  gradient.conv.load_filter(args, channel);
  gradient.conv.start(args, gX, span, span.begin, channel);
#pragma unroll
  for (int j = 0; j < kTaps; ++j) gradient.g[j][0] = 0.0f;
#pragma unroll
  for (int i = 0; i < kTaps - 1; ++i) {
    const int64_t t = span.begin + i;
    const bool known = t < span.end;
    Vector<Element, 1> x, gate, dout;
    if (known) {
      x = load_vector<1>(gX + t * args.x.stride1);
      dout = load_vector<1>(gDout + t * args.dout.stride1);
      if (gated) gate = load_vector<1>(gGate + t * args.gate.stride1);
    }
    float dgate[1], dx[1];
    gradient.conv.push(x);
    gradient.push_gradient(args, known, span, dout, gate, dgate);
    gradient.input_gradient(args, span, t, channel, dx);
    gDinitial[i] = from_float<Element>(dx[0]);
  }
}

constexpr int kReduceRows = 8;

// dweight and dbias from the partial sums of all tiles. A block has 32 channels of one tap (the
// K-th stands for the bias); its rows share the tiles. Summed in double.
template <class Element>
__global__ void short_conv_reduce_kernel(ConvBackwardArgs args, int taps) {
  __shared__ double s_sums[kReduceRows][kConvLanes];
  const int blocks = (args.channels + kConvLanes - 1) / kConvLanes;
  const int channel = blockIdx.x % blocks * kConvLanes + threadIdx.x, j = blockIdx.x / blocks;
  double sum = 0.0;
  if (channel < args.channels) {
    const float* gPartials = args.partials + int64_t(j) * args.channels + channel;
    const int64_t stride = int64_t(taps + 1) * args.channels;
#pragma unroll 4
    for (int64_t tile = threadIdx.y; tile < args.tiles; tile += kReduceRows) {
      sum += gPartials[tile * stride];
    }
  }
  s_sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= args.channels) return;
  for (int row = 1; row < kReduceRows; ++row) sum += s_sums[row][threadIdx.x];
  const Element value = from_float<Element>(static_cast<float>(sum));
  if (j < taps) {
    static_cast<Element*>(args.dweight.data)[channel * args.dweight.stride0 + j] = value;
  } else if (args.dbias != nullptr) {
    static_cast<Element*>(args.dbias)[channel] = value;
  }
}

}  // namespace based::cuda
