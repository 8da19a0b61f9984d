// Short gated convolution against naive loops in double.
#include "short_conv_reference.h"

namespace based::testing::short_conv {
namespace {

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
    check({1, 300, 2100, 3, DType::kFloat32, layout});
    check({1, 260, 2049, 8, DType::kBFloat16, layout});
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
}  // namespace based::testing::short_conv
