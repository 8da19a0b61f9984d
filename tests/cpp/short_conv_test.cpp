// Short gated convolution against naive loops in double.
#include "testing.h"

namespace based::testing {
namespace {

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
Expected reference(const Problem& problem) {
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

void expect_gradients(const Problem& problem, const Expected& e, double tolerance) {
  expect_close("dx", problem.dx, e.dx, tolerance);
  expect_close("dweight", problem.dweight, e.dweight, tolerance);
  if (problem.c.bias) expect_close("dbias", problem.dbias, e.dbias, tolerance);
  if (problem.c.gate) expect_close("dgate", problem.dgate, e.dgate, tolerance);
  if (problem.c.state) expect_close("dinitial_state", problem.dinitial, e.dinitial, tolerance);
}

void check(const Case& c) {
  SCOPED_TRACE(c.text());
  Problem problem(c);
  const Expected e = reference(problem);
  expect_ok(cpu::short_conv(problem.params()));
  expect_close("out", problem.out, e.out, forward_tolerance(c.dtype));
  if (c.state) expect_close("final_state", problem.final_state, e.final_state, 0);
  expect_ok(cpu::short_conv_backward(problem.params()));
  expect_gradients(problem, e, gradient_tolerance(c.dtype));
}

TEST(ShortConv, EveryLengthTapsAndDtype) {
  for (DType dtype : kDTypes) {
    for (int64_t seqlen : kSeqlens) {
      for (int64_t taps = 2; taps <= 8; ++taps) check({2, seqlen, 5, taps, dtype});
    }
  }
}

TEST(ShortConv, EveryFlag) {
  for (int flags = 0; flags < 32; ++flags) {
    const Layout layout = flags & 16 ? Layout::kStrided : Layout::kContiguous;
    for (DType dtype : kDTypes) {
      check({3, 67, 37, 4, dtype, layout, bool(flags & 1), bool(flags & 2), bool(flags & 4),
             bool(flags & 8)});
    }
  }
}

TEST(ShortConv, SeveralChannelAndTokenBlocks) {
  for (Layout layout : {Layout::kContiguous, Layout::kStrided}) {
    check({2, 515, 1030, 3, DType::kFloat32, layout});
    check({1, 1030, 513, 8, DType::kBFloat16, layout});
  }
}

TEST(ShortConv, EmptyTensors) {
  check({0, 5, 3, 3});
  check({2, 5, 0, 3});
  check({1, 0, 3, 3, DType::kFloat32, Layout::kContiguous, true, true, true, true, {0}});
}

TEST(ShortConv, PackedSequences) {
  for (DType dtype : kDTypes) {
    check({1,
           600,
           19,
           4,
           dtype,
           Layout::kStrided,
           true,
           true,
           true,
           true,
           {0, 0, 1, 3, 3, 3, 10, 255, 256, 257, 600, 600}});
    check({1, 300, 3, 8, dtype, Layout::kContiguous, false, false, true, false, {0, 300}});
  }
}

TEST(ShortConv, NanStaysInItsSequence) {
  const Case c{1,    30,   9,    4,    DType::kFloat32, Layout::kContiguous,
               true, true, true, true, {0, 10, 20, 30}};
  Problem clean(c), dirty(c);
  for (Tensor* tensor : {&dirty.x, &dirty.gate, &dirty.dout}) {
    for (int64_t t : {9, 20}) {  // the neighbours' tokens next to sequence 1
      for (int64_t i = 0; i < 9; ++i) tensor->set(t * 9 + i, NAN);
    }
  }
  for (Problem* problem : {&clean, &dirty}) {
    expect_ok(cpu::short_conv(problem->params()));
    expect_ok(cpu::short_conv_backward(problem->params()));
  }
  const auto middle = [](const Tensor& tensor) {
    const Values all = tensor.values();
    return Values(all.begin() + all.size() / 3, all.begin() + all.size() / 3 * 2);
  };
  EXPECT_EQ(middle(clean.out), middle(dirty.out));
  EXPECT_EQ(middle(clean.final_state), middle(dirty.final_state));
  EXPECT_EQ(middle(clean.dx), middle(dirty.dx));
  EXPECT_EQ(middle(clean.dgate), middle(dirty.dgate));
  EXPECT_EQ(middle(clean.dinitial), middle(dirty.dinitial));
}

TEST(ShortConv, WeightGradientOverManyTokens) {
  for (double mean : {0.0, 0.5}) {
    Problem problem({3, 100003, 4, 3}, mean);
    expect_ok(cpu::short_conv_backward(problem.params()));
    expect_gradients(problem, reference(problem), 2e-5);
  }
}

TEST(ShortConv, GradientsDoNotDependOnThreads) {
  Problem problem({2, 700, 600, 4});
  expect_ok(cpu::short_conv_backward(problem.params()));
  for (int parts : {1, 3, 7}) {
    Problem other({2, 700, 600, 4});
    expect_ok(cpu::short_conv_backward(other.params(), threads(parts)));
    EXPECT_EQ(problem.dweight.bytes, other.dweight.bytes);
    EXPECT_EQ(problem.dbias.bytes, other.dbias.bytes);
    EXPECT_EQ(problem.dx.bytes, other.dx.bytes);
  }
}

TEST(ShortConv, NamedErrors) {
  const auto fails = [](const char* part, auto&& spoil) {
    Problem problem({2, 5, 3, 4});
    ShortConvBackwardParams p = problem.params();
    spoil(p);
    expect_error(cpu::short_conv(p), std::string("short_conv: ") + part);
    expect_error(cpu::short_conv_backward(p), std::string("short_conv_backward: ") + part);
  };
  fails("x: ", [](auto& p) { p.x.rank = 2; });
  fails("x: expected a contiguous last dimension", [](auto& p) { p.x.stride[2] = 2; });
  fails("weight: expected K = 2..8 taps, got 9", [](auto& p) { p.weight.size[1] = 9; });
  fails("weight: ", [](auto& p) { p.weight.dtype = DType::kFloat64; });
  fails("bias: ", [](auto& p) { p.bias.size[0] = 4; });
  fails("gate: ", [](auto& p) { p.gate.size[1] = 4; });
  fails("initial_state: ", [](auto& p) { p.initial_state.size[2] = 2; });
  fails("cu_seqlens: ", [](auto& p) { p.cu_seqlens = p.bias; });
  static int32_t bounds[] = {0, 6};
  const TensorView cu_seqlens = contiguous_view(bounds, DType::kInt32, 2);
  fails("cu_seqlens: expected batch 1", [&](auto& p) { p.cu_seqlens = cu_seqlens; });
}

TEST(ShortConvDecode, EqualsTheSequenceTokenByToken) {
  for (DType dtype : kDTypes) {
    for (int64_t taps = 2; taps <= 8; ++taps) {
      const Case c{11, 13, 521, taps, dtype, Layout::kStrided};
      Problem problem(c);
      const Expected e = reference(problem);
      Tensor state = problem.initial;
      for (int64_t t = 0; t < c.seqlen; ++t) {
        const auto token = [&](const Tensor& tensor) {  // (B, C) at t
          TensorView view = tensor.view;
          const int64_t offset = t * view.stride[1] * element_size(dtype);
          view.data = static_cast<char*>(view.data) + offset;
          view.rank = 2, view.size[1] = view.size[2], view.stride[1] = view.stride[2];
          return view;
        };
        ShortConvDecodeParams p;
        p.x = token(problem.x), p.gate = token(problem.gate), p.out = token(problem.out);
        p.weight = problem.weight.view, p.bias = problem.bias.view, p.conv_state = state.view;
        p.activation = Activation::kSilu;
        expect_ok(cpu::short_conv_decode(p));
      }
      expect_close("out", problem.out, e.out, forward_tolerance(dtype));
      expect_close("conv_state", state, e.final_state, 0);
    }
  }
}

TEST(ShortConvDecode, SlotsAndSkippedRows) {
  std::mt19937 random(0);
  const int64_t C = 7, K = 3, slots = 5;
  for (DType index : {DType::kInt32, DType::kInt64}) {
    const Tensor x = random_tensor(random, DType::kFloat32, {3, C});
    const Tensor weight = random_tensor(random, DType::kFloat32, {C, K});
    Tensor state = random_tensor(random, DType::kFloat32, {slots, C, K - 1}, Layout::kStrided);
    for (int64_t slot : {0, 2, 3}) {
      for (int64_t i = 0; i < C * (K - 1); ++i) state.set(slot * C * (K - 1) + i, NAN);
    }
    const Tensor before = state, indices = index_tensor(index, {4, -1, 1});
    Tensor out(DType::kFloat32, {3, C});
    ShortConvDecodeParams p;
    p.x = x.view, p.weight = weight.view, p.out = out.view, p.conv_state = state.view;
    p.state_indices = indices.view;
    expect_ok(cpu::short_conv_decode(p));
    Tensor shifted = before;
    Values expected(3 * C);
    for (int64_t row : {0, 2}) {
      const int64_t slot = row == 0 ? 4 : 1;
      for (int64_t c = 0; c < C; ++c) {
        const int64_t oldest = (slot * C + c) * 2;
        const double inputs[] = {before.get(oldest), before.get(oldest + 1), x.get(row * C + c)};
        for (int64_t j = 0; j < K; ++j) expected[row * C + c] += weight.get(c * K + j) * inputs[j];
        shifted.set(oldest, inputs[1]);
        shifted.set(oldest + 1, inputs[2]);
      }
    }
    expect_close("out", out, expected, 5e-6);
    EXPECT_EQ(state.bytes, shifted.bytes);

    const Tensor twice = index_tensor(index, {4, 4, 1}), outside = index_tensor(index, {5, 0, 1});
    p.state_indices = twice.view;
    expect_error(cpu::short_conv_decode(p), "short_conv_decode: state_indices: ");
    p.state_indices = outside.view;
    expect_error(cpu::short_conv_decode(p), "short_conv_decode: state_indices: ");
    p.state_indices = TensorView();
    expect_error(cpu::short_conv_decode(p), "short_conv_decode: conv_state: ");
    EXPECT_EQ(state.bytes, shifted.bytes);
  }
}

}  // namespace
}  // namespace based::testing
