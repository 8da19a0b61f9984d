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
  const float s = sigmoid(sum);
  return {dout * gate * s * (1.0f + sum * (1.0f - s)), dout * sum * s};
}

// One thread per kVec channels and run of tokens; it computes g of the K-1 tokens behind the run
// again, because dx of its last tokens needs them.
template <class Element, int kTaps, int kVec>
struct ConvGradient {
  Convolution<Element, kTaps, kVec> conv;
  float g[kTaps][kVec];              // of the last K tokens
  float sums[kTaps + 1][kVec] = {};  // dweight and dbias

  // dx and dgate of tokens [begin, end) of a span.
  template <int kAhead>
  __device__ __forceinline__ void run(const ConvBackwardArgs& args, const Span& span, int64_t row,
                                      int64_t begin, int64_t end, int channel) {
    const Element* gX = row_of<Element>(args.x, row, channel);
    const Element* gGate = row_of<Element>(args.gate, row, channel);
    const Element* gDout = row_of<Element>(args.dout, row, channel);
    Element* gDx = mutable_row_of<Element>(args.dx, row, channel);
    Element* gDgate = mutable_row_of<Element>(args.dgate, row, channel);
    const bool gated = args.gate.data != nullptr, wants_dgate = args.dgate.data != nullptr;
    const int64_t behind = end + kTaps - 1, known = min(span.end, behind);
    conv.start(args, gX, span, begin, channel);

    for (int64_t first = begin; first < behind; first += kAhead) {
      Vector<Element, kVec> x[kAhead] = {}, gate[kAhead] = {}, dout[kAhead] = {};
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t t = first + u;
        if (t >= known) continue;
        x[u] = load_vector<kVec>(gX + t * args.x.stride1);
        dout[u] = load_vector<kVec>(gDout + t * args.dout.stride1);
        if (gated) gate[u] = load_vector<kVec>(gGate + t * args.gate.stride1);
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int64_t t = first + u;
        conv.push(x[u]);
        float dgate[kVec];
        push_gradient(t < known, span, dout[u], gate[u], gated, args.silu, dgate);
        if (t < end) {
          add_weight_gradient();
          if (wants_dgate) store_vector(gDgate + t * args.dgate.stride1, dgate);
        }
        const int64_t s = t - (kTaps - 1);
        if (s < begin || s >= end) continue;
        float dx[kVec];
        input_gradient(args, span, s, channel, dx);
        store_vector(gDx + s * args.dx.stride1, dx);
      }
    }
  }

  __device__ __forceinline__ void push_gradient(bool known, const Span& span,
                                                const Vector<Element, kVec>& dout,
                                                const Vector<Element, kVec>& gate, bool gated,
                                                bool silu, float (&dgate)[kVec]) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
#pragma unroll
      for (int j = 1; j < kTaps; ++j) g[j - 1][i] = g[j][i];
      const float factor = gated ? to_float(gate.values[i]) : 1.0f;
      const TokenGradient token =
          token_gradient(conv.sum(i), to_float(dout.values[i]), factor, silu);
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

  // dx of token s, whose last reader is the token pushed last; a token that the final state keeps
  // has a gradient from there too.
  __device__ __forceinline__ void input_gradient(const ConvBackwardArgs& args, const Span& span,
                                                 int64_t s, int channel, float (&dx)[kVec]) const {
    const int64_t kept = s - (span.end - (kTaps - 1));
    const bool final_too = args.dfinal.data != nullptr && kept >= 0 && span.n >= 0;
    const Element* gFinal =
        row_of<Element>(args.dfinal, span.n, 0) + channel * args.dfinal.stride1 + kept;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      dx[i] = final_too ? to_float(gFinal[i * args.dfinal.stride1]) : 0.0f;
#pragma unroll
      for (int j = 0; j < kTaps; ++j) dx[i] += conv.weight[j][i] * g[kTaps - 1 - j][i];
    }
  }
};

template <class Element, int kTaps, int kVec, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) short_conv_bwd_kernel(ConvBackwardArgs args) {
  const ConvPlace place = conv_place<Tile, kVec>(args);
  ConvGradient<Element, kTaps, kVec> gradient;
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
