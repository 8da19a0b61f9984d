// Linear attention against the quadratic definition in double.
#include "linear_attention_reference.h"

namespace based::testing::linear_attention {
namespace {

void expect_forward(const Problem& problem, const Expected& e, double tolerance) {
  expect_close("out", problem.out, e.out, tolerance);
  if (!problem.c.state) return;
  const double state_tolerance = forward_tolerance(accumulator(problem.c.dtype));
  expect_close("final_kv_state", problem.final_kv, e.final_kv, state_tolerance);
  expect_close("final_k_state", problem.final_z, e.final_z, state_tolerance);
}

void check(const Case& c) {
  SCOPED_TRACE(c.text());
  Problem problem(c);
  const Expected e = reference(problem);
  expect_ok(cpu::linear_attention(problem.params()));
  expect_forward(problem, e, forward_tolerance(c.dtype));
  expect_ok(cpu::linear_attention_backward(problem.params()));
  const double tolerance = gradient_tolerance(c.dtype);
  expect_close("dq", problem.dq, e.dq, tolerance);
  expect_close("dk", problem.dk, e.dk, tolerance);
  expect_close("dv", problem.dv, e.dv, tolerance);
  if (!c.state) return;
  const double state_tolerance = gradient_tolerance(accumulator(c.dtype));
  expect_close("dinitial_kv_state", problem.dkv, e.dkv, state_tolerance);
  expect_close("dinitial_k_state", problem.dz, e.dz, state_tolerance);
}

TEST(LinearAttention, EveryLengthAndDtype) {
  for (DType dtype : kDTypes) {
    for (int64_t seqlen : kSeqlens) {
      check({1, seqlen, 2, 4, 5, dtype});
      check({1, seqlen, 1, 4, 5, dtype, Layout::kContiguous, true, false});
    }
  }
}

TEST(LinearAttention, EveryFlagAndLayout) {
  for (int flags = 0; flags < 8; ++flags) {
    const Layout layout = flags & 4 ? Layout::kStrided : Layout::kContiguous;
    for (DType dtype : kDTypes) {
      for (double mean : {0.0, 0.5}) {
        check({2, 70, 3, 3, 7, dtype, layout, bool(flags & 1), bool(flags & 2), {}, mean});
      }
    }
  }
}

TEST(LinearAttention, EveryWidth) {
  for (int64_t D : {1, 2, 3, 8, 15, 16}) {
    for (int64_t V : {1, 3, 16, 33, 64}) check({1, 66, 1, D, V});
  }
}

TEST(LinearAttention, EmptyTensors) {
  check({0, 5, 2, 4, 5});
  check({2, 5, 0, 4, 5});
  Case no_sequences{1, 0, 1, 4, 5};
  no_sequences.cu_seqlens = {0};
  check(no_sequences);
}

TEST(LinearAttention, PackedSequences) {
  for (DType dtype : kDTypes) {
    for (int flags = 0; flags < 4; ++flags) {
      check({1,
             200,
             2,
             4,
             5,
             dtype,
             Layout::kStrided,
             bool(flags & 1),
             bool(flags & 2),
             {0, 0, 1, 3, 3, 66, 67, 131, 131, 200, 200}});
    }
  }
}

TEST(LinearAttention, OnesStayOnes) {
  for (DType dtype : kDTypes) {
    Case c{2, 300, 2, 8, 9, dtype};
    c.state = false;
    Problem problem(c);
    problem.v.assign(Values(problem.v.count(), 1));
    expect_ok(cpu::linear_attention(problem.params()));
    const double tolerance = dtype == DType::kFloat64 ? 1e-13 : 1e-6;
    for (double x : problem.out.values()) ASSERT_NEAR(x, 1, tolerance);
  }
}

TEST(LinearAttention, NanStaysInItsSequence) {
  Case c{1, 210, 2, 4, 5};
  c.cu_seqlens = {0, 70, 140, 210};
  Problem clean(c), dirty(c);
  for (Tensor* tensor : {&dirty.q, &dirty.k, &dirty.v, &dirty.dout}) {
    const int64_t width = tensor->count() / 210;
    for (int64_t t : {69, 140}) {  // the neighbours' tokens next to sequence 1
      for (int64_t i = 0; i < width; ++i) tensor->set(t * width + i, NAN);
    }
  }
  for (Problem* problem : {&clean, &dirty}) {
    expect_ok(cpu::linear_attention(problem->params()));
    expect_ok(cpu::linear_attention_backward(problem->params()));
  }
  const auto middle = [](const Tensor& tensor) {
    const Values all = tensor.values();
    return Values(all.begin() + all.size() / 3, all.begin() + all.size() / 3 * 2);
  };
  const auto expect_same = [&](Tensor Problem::* tensor) {
    EXPECT_EQ(middle(clean.*tensor), middle(dirty.*tensor));
  };
  expect_same(&Problem::out), expect_same(&Problem::final_kv), expect_same(&Problem::final_z);
  expect_same(&Problem::dq), expect_same(&Problem::dk), expect_same(&Problem::dv);
  expect_same(&Problem::dkv), expect_same(&Problem::dz);
}

TEST(LinearAttention, NanOfTheFutureStaysThere) {
  for (bool normalize : {true, false}) {
    for (int64_t bad : {1, 63, 64, 70}) {
      Problem clean({1, 90, 1, 4, 5}), dirty({1, 90, 1, 4, 5});
      for (Tensor* tensor : {&dirty.q, &dirty.k, &dirty.v}) {
        const int64_t width = tensor->count() / 90;
        for (int64_t i = bad * width; i < tensor->count(); ++i) tensor->set(i, NAN);
      }
      for (Problem* problem : {&clean, &dirty}) {
        problem->c.normalize = normalize;
        expect_ok(cpu::linear_attention(problem->params()));
      }
      for (int64_t i = 0; i < bad * 5; ++i) ASSERT_EQ(clean.out.get(i), dirty.out.get(i)) << bad;
    }
  }
}

TEST(LinearAttention, ResultsDoNotDependOnThreads) {
  Problem problem({2, 130, 3, 8, 16});
  expect_ok(cpu::linear_attention_backward(problem.params()));
  for (int parts : {1, 3, 6}) {
    Problem other({2, 130, 3, 8, 16});
    expect_ok(cpu::linear_attention_backward(other.params(), threads(parts)));
    EXPECT_EQ(problem.dq.bytes, other.dq.bytes);
    EXPECT_EQ(problem.dk.bytes, other.dk.bytes);
    EXPECT_EQ(problem.dv.bytes, other.dv.bytes);
    EXPECT_EQ(problem.dkv.bytes, other.dkv.bytes);
  }
}

TEST(LinearAttention, NamedErrors) {
  const auto fails = [](const char* part, auto&& spoil) {
    Problem problem({2, 5, 3, 4, 6});
    LinearAttentionBackwardParams p = problem.params();
    spoil(p);
    expect_error(cpu::linear_attention(p), std::string("linear_attention: ") + part);
    expect_error(cpu::linear_attention_backward(p),
                 std::string("linear_attention_backward: ") + part);
  };
  fails("q: ", [](auto& p) { p.q.rank = 3; });
  fails("q: expected a contiguous last dimension", [](auto& p) { p.q.stride[3] = 2; });
  fails("k: ", [](auto& p) { p.k.size[3] = 5; });
  fails("v: ", [](auto& p) { p.v.dtype = DType::kFloat16; });
  fails("v: ", [](auto& p) { p.v.size[2] = 1; });
  fails("scale: ", [](auto& p) { p.scale = -1; });
  fails("initial_k_state: ", [](auto& p) { p.initial_k_state = TensorView(); });
  fails("initial_kv_state: ", [](auto& p) { p.initial_kv_state.size[2] = 16; });
  static int32_t bounds[] = {0, 6};
  const TensorView cu_seqlens = contiguous_view(bounds, DType::kInt32, 2);
  fails("cu_seqlens: expected batch 1", [&](auto& p) { p.cu_seqlens = cu_seqlens; });
}

// Token t (B, H, .) of a (B, T, H, .) tensor.
TensorView token(const Tensor& tensor, int64_t t) {
  TensorView view = tensor.view;
  const int64_t offset = t * view.stride[1] * element_size(view.dtype);
  view.data = static_cast<char*>(view.data) + offset;
  view.rank = 3, view.size[1] = view.size[2], view.size[2] = view.size[3];
  view.stride[1] = view.stride[2], view.stride[2] = view.stride[3];
  return view;
}

// The params of token t of a problem, whose final state is the one decoded with.
template <class Params>
Params token_params(const Problem& problem, int64_t t) {
  Params p;
  p.q = token(problem.q, t), p.k = token(problem.k, t), p.v = token(problem.v, t);
  p.out = token(problem.out, t), p.scale = problem.c.scale, p.normalize = problem.c.normalize;
  p.kv_state = problem.final_kv.view, p.k_state = problem.final_z.view;
  return p;
}

TEST(LinearAttentionDecode, EqualsTheSequenceTokenByToken) {
  for (DType dtype : kDTypes) {
    for (int64_t V : {1, 5, 16, 70}) {
      for (bool normalize : {true, false}) {
        const Case c{3, 7, 2, 5, V, dtype, Layout::kStrided, normalize};
        Problem problem(c);
        const Expected e = reference(problem);
        problem.final_kv = problem.kv, problem.final_z = problem.z;
        for (int64_t t = 0; t < c.seqlen; ++t) {
          expect_ok(
              cpu::linear_attention_decode(token_params<LinearAttentionDecodeParams>(problem, t)));
        }
        expect_forward(problem, e, forward_tolerance(dtype));
      }
    }
  }
}

// Rows come to be at different fill levels, with places of the ring that nobody wrote to.
TEST(LinearAttentionDecode, DeferredEqualsTheSequence) {
  for (DType dtype : kDTypes) {
    for (int64_t capacity : {1, 3, 9}) {
      const Case c{3, 7, 2, 5, 6, dtype, Layout::kStrided};
      Problem problem(c);
      const Expected e = reference(problem);
      problem.final_kv = problem.kv, problem.final_z = problem.z;
      Tensor ring_k(dtype, {3, capacity, 2, 5}), ring_v(dtype, {3, capacity, 2, 6});
      Tensor fill = index_tensor(DType::kInt32, {0, 0, 0});
      const auto fold = [&](const std::vector<int64_t>& slots) {
        const Tensor indices = index_tensor(DType::kInt64, slots);
        LinearAttentionFoldParams p;
        p.kv_state = problem.final_kv.view, p.k_state = problem.final_z.view;
        p.pending_k = ring_k.view, p.pending_v = ring_v.view, p.fill = fill.view;
        p.state_indices = indices.view, p.scale = c.scale;
        expect_ok(cpu::linear_attention_fold(p));
      };
      for (int64_t t = 0; t < c.seqlen; ++t) {
        auto p = token_params<LinearAttentionDecodeDeferredParams>(problem, t);
        p.pending_k = ring_k.view, p.pending_v = ring_v.view, p.fill = fill.view;
        expect_ok(cpu::linear_attention_decode_deferred(p));
        for (int row : {0, 1, 2}) {
          fill.set(row, static_cast<double>(static_cast<int64_t>(fill.get(row) + 1) % capacity));
        }
        if (t % 2 == 0) continue;
        fold({-1, 1, -1});  // row 1 becomes plain in between
        fill.set(1, 0);
      }
      fold({0, 1, 2});
      expect_forward(problem, e, forward_tolerance(dtype));
    }
  }
}

TEST(LinearAttentionDecode, SlotsAndSkippedRows) {
  const int64_t slots = 5, H = 2, D = 3, V = 6, F = expanded_dim(D);
  // A prefill of length 1 from the states of slots 4 and 1 gives what rows 0 and 2 must.
  Problem one({2, 1, H, D, V});
  std::mt19937 random(0);
  Tensor kv(DType::kFloat32, {slots, H, F, V}), z(DType::kFloat32, {slots, H, F});  // NaN
  const auto put = [](Tensor& to, int64_t slot, const Tensor& from, int64_t row) {
    const int64_t count = from.count() / from.view.size[0];
    for (int64_t i = 0; i < count; ++i) to.set(slot * count + i, from.get(row * count + i));
  };
  put(kv, 4, one.kv, 0), put(kv, 1, one.kv, 1), put(z, 4, one.z, 0), put(z, 1, one.z, 1);
  Tensor q(DType::kFloat32, {3, H, D}), k = q, v(DType::kFloat32, {3, H, V}), out = v;
  for (int64_t row : {0, 1}) {  // row 1 of the call keeps its NaN
    put(q, 2 * row, one.q, row), put(k, 2 * row, one.k, row), put(v, 2 * row, one.v, row);
  }
  const Tensor indices = index_tensor(DType::kInt64, {4, -1, 1});
  LinearAttentionDecodeParams p;
  p.q = q.view, p.k = k.view, p.v = v.view, p.out = out.view, p.kv_state = kv.view;
  p.k_state = z.view, p.state_indices = indices.view, p.scale = one.c.scale;
  Tensor expected_kv = kv, expected_z = z, expected_out(DType::kFloat32, {3, H, V});
  expected_out.assign(Values(expected_out.count()));
  expect_ok(cpu::linear_attention(one.params()));
  put(expected_kv, 4, one.final_kv, 0), put(expected_kv, 1, one.final_kv, 1);
  put(expected_z, 4, one.final_z, 0), put(expected_z, 1, one.final_z, 1);
  put(expected_out, 0, one.out, 0), put(expected_out, 2, one.out, 1);

  expect_ok(cpu::linear_attention_decode(p));
  expect_close("out", out, expected_out.values(), 5e-6);
  const auto expect_state = [](const Tensor& got, const Tensor& expected) {
    for (int64_t i = 0; i < got.count(); ++i) {
      if (std::isnan(expected.get(i))) {
        ASSERT_TRUE(std::isnan(got.get(i)));
      } else {
        ASSERT_NEAR(got.get(i), expected.get(i), 1e-5);
      }
    }
  };
  expect_state(kv, expected_kv);
  expect_state(z, expected_z);
  const Tensor twice = index_tensor(DType::kInt32, {4, 4, 1});
  p.state_indices = twice.view;
  expect_error(cpu::linear_attention_decode(p), "linear_attention_decode: state_indices: ");
  p.state_indices = TensorView();
  expect_error(cpu::linear_attention_decode(p), "linear_attention_decode: kv_state: ");
}

}  // namespace
}  // namespace based::testing::linear_attention
