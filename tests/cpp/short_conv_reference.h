// A random short-convolution problem, and its answer by naive loops in double.
#pragma once

#include "testing.h"

namespace based::testing::short_conv {

struct Case {
  int64_t batch, seqlen, channels, taps;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kContiguous;
  bool bias = true, gate = true, silu = true, state = true;
  std::vector<int64_t> cu_seqlens = {};  // packed when not empty

  int64_t sequences() const { return cu_seqlens.empty() ? batch : int64_t(cu_seqlens.size()) - 1; }
  // Its first token, counted over all batch rows, and its length.
  int64_t begin(int64_t n) const { return cu_seqlens.empty() ? n * seqlen : cu_seqlens[n]; }
  int64_t length(int64_t n) const { return begin(n + 1) - begin(n); }

  std::string text() const {
    return "B" + std::to_string(batch) + " T" + std::to_string(seqlen) + " C" +
           std::to_string(channels) + " K" + std::to_string(taps) + " " + name(dtype) +
           (bias ? " bias" : "") + (gate ? " gate" : "") + (silu ? " silu" : "") +
           (state ? " state" : "") + (cu_seqlens.empty() ? "" : " packed") +
           (layout == Layout::kStrided ? " strided" : "");
  }
};

// Inputs, outputs and gradients of a case. What the case leaves out is not given.
struct Problem {
  Case c;
  Tensor x, weight, bias, gate, initial, cu_seqlens, dout, dfinal;
  Tensor out, final_state, dx, dweight, dbias, dgate, dinitial;

  explicit Problem(const Case& chosen, double mean = 0) : c(chosen) {
    std::mt19937 random(c.batch + 2 * c.seqlen + 3 * c.channels + 5 * c.taps);
    const std::vector<int64_t> tokens = {c.batch, c.seqlen, c.channels};
    const std::vector<int64_t> states = {c.sequences(), c.channels, c.taps - 1};
    const auto input = [&](const std::vector<int64_t>& sizes) {
      return random_tensor(random, c.dtype, sizes, c.layout, mean);
    };
    const auto output = [&](const std::vector<int64_t>& sizes) {
      return Tensor(c.dtype, sizes, c.layout);
    };
    x = input(tokens), dout = input(tokens), weight = input({c.channels, c.taps});
    out = output(tokens), dx = output(tokens), dweight = output({c.channels, c.taps});
    if (c.bias) bias = input({c.channels}), dbias = output({c.channels});
    if (c.gate) gate = input(tokens), dgate = output(tokens);
    if (c.state) initial = input(states), dfinal = input(states);
    if (c.state) final_state = output(states), dinitial = output(states);
    if (!c.cu_seqlens.empty()) cu_seqlens = index_tensor(DType::kInt32, c.cu_seqlens);
  }

  ShortConvBackwardParams params() const {
    ShortConvBackwardParams p;
    p.x = x.view, p.weight = weight.view, p.bias = bias.view, p.gate = gate.view;
    p.initial_state = initial.view, p.cu_seqlens = cu_seqlens.view;
    p.out = out.view, p.final_state = final_state.view;
    p.activation = c.silu ? Activation::kSilu : Activation::kNone;
    p.dout = dout.view, p.dfinal_state = dfinal.view, p.dx = dx.view, p.dweight = dweight.view;
    p.dbias = dbias.view, p.dgate = dgate.view, p.dinitial_state = dinitial.view;
    return p;
  }
};

struct Expected {
  Values out, final_state, dx, dweight, dbias, dgate, dinitial;
};

// Forward and gradients of sum(out * dout) + sum(final_state * dfinal).
inline Expected reference(const Problem& problem) {
  const Case& c = problem.c;
  const int64_t C = c.channels, K = c.taps, history = K - 1;
  Expected e;
  e.out = e.dx = e.dgate = Values(problem.x.count());
  e.final_state = e.dinitial = Values(c.sequences() * C * history);
  e.dweight = Values(C * K), e.dbias = Values(C);
  const Tensor &x = problem.x, &gate = problem.gate, &weight = problem.weight;
  for (int64_t n = 0; n < c.sequences(); ++n) {
    for (int64_t channel = 0; channel < C; ++channel) {
      const int64_t begin = c.begin(n), length = c.length(n);
      const auto at = [&](int64_t t) { return (begin + t) * C + channel; };
      const auto in_state = [&](int64_t i) { return (n * C + channel) * history + i; };
      Values input(history + length), dinput(history + length);  // the state, then x
      for (int64_t i = 0; i < history; ++i) {
        input[i] = c.state ? problem.initial.get(in_state(i)) : 0;
        if (c.state) dinput[length + i] = problem.dfinal.get(in_state(i));
      }
      for (int64_t t = 0; t < length; ++t) input[history + t] = x.get(at(t));
      for (int64_t t = 0; t < length; ++t) {
        double sum = c.bias ? problem.bias.get(channel) : 0;
        for (int64_t j = 0; j < K; ++j) sum += weight.get(channel * K + j) * input[t + j];
        const double sigmoid = 1 / (1 + std::exp(-sum));
        const double act = c.silu ? sum * sigmoid : sum;
        const double slope = c.silu ? sigmoid + sum * sigmoid * (1 - sigmoid) : 1;
        const double g = c.gate ? gate.get(at(t)) : 1, dout = problem.dout.get(at(t));
        e.out[at(t)] = act * g;
        e.dgate[at(t)] = act * dout;
        e.dbias[channel] += dout * g * slope;
        for (int64_t j = 0; j < K; ++j) {
          e.dweight[channel * K + j] += dout * g * slope * input[t + j];
          dinput[t + j] += dout * g * slope * weight.get(channel * K + j);
        }
      }
      for (int64_t i = 0; i < history; ++i) {
        e.final_state[in_state(i)] = input[length + i];
        e.dinitial[in_state(i)] = dinput[i];
      }
      for (int64_t t = 0; t < length; ++t) e.dx[at(t)] = dinput[history + t];
    }
  }
  return e;
}

}  // namespace based::testing::short_conv
