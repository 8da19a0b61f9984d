// Sliding-window attention against its definition in fp64: one query at a time, over all keys.
#include <cmath>

#include "testing.h"

namespace based::testing {
namespace {

struct Case {
  std::vector<int64_t> lengths;  // of the sequences; packed unless all are equal
  int64_t H, V, W;
  std::vector<int64_t> positions;  // of the initial rings; empty: no initial ring
  bool packed = false;
  Layout layout = Layout::kContiguous;
  double scale = 0.25;

  int64_t sequences() const { return static_cast<int64_t>(lengths.size()); }
};

// The tensors of one call. Outputs, unused slots of the rings and the gradient of slots that are
// never written are NaN.
struct Call {
  Case c;
  SlidingWindowBackwardParams p;
  Tensor q, k, v, cu_seqlens, ring_k, ring_v, positions, dout, dfinal_k, dfinal_v;
  Tensor out, lse, final_k, final_v, final_positions, dq, dk, dv, dring_k, dring_v;
  std::vector<int64_t> starts = {0};

  Call(std::mt19937& random, DType dtype, const Case& shape) : c(shape) {
    for (int64_t length : c.lengths) starts.push_back(starts.back() + length);
    const int64_t N = c.sequences(), B = c.packed ? 1 : N,
                  T = c.packed ? starts.back() : c.lengths[0];
    const auto input = [&](double mean) {
      return random_tensor(random, dtype, {B, T, c.H, c.V}, c.layout, mean);
    };
    const auto empty = [&] { return Tensor(dtype, {B, T, c.H, c.V}, c.layout); };
    const auto ring = [&] { return Tensor(dtype, {N, c.W, c.H, c.V}, c.layout); };
    q = input(0), k = input(0.2), v = input(0.5), dout = input(0.1);
    ring_k = ring(), ring_v = ring(), dfinal_k = ring(), dfinal_v = ring();
    out = empty(), dq = empty(), dk = empty(), dv = empty();
    final_k = ring(), final_v = ring(), dring_k = ring(), dring_v = ring();
    lse = Tensor(accumulator(dtype), {B, T, c.H}, c.layout);
    if (c.packed) p.cu_seqlens = (cu_seqlens = index_tensor(DType::kInt32, starts)).view;
    final_positions = Tensor(DType::kInt64, {N});
    if (!c.positions.empty()) positions = index_tensor(DType::kInt64, c.positions);
    for (int64_t n = 0; n < N; ++n) {
      fill_slots(random, ring_k, ring_v, n, seen(n));
      fill_slots(random, dfinal_k, dfinal_v, n, seen(n) + c.lengths[n]);
    }
    p.window = c.W, p.scale = c.scale;
    connect();
  }

  Call(const Call&) = delete;

  void connect() {
    p.q = q.view, p.k = k.view, p.v = v.view, p.out = out.view, p.lse = lse.view;
    if (!c.positions.empty()) {
      p.initial_k_cache = ring_k.view, p.initial_v_cache = ring_v.view;
      p.initial_positions = positions.view;
      p.dinitial_k_cache = dring_k.view, p.dinitial_v_cache = dring_v.view;
    }
    p.final_k_cache = final_k.view, p.final_v_cache = final_v.view;
    p.final_positions = final_positions.view;
    p.dout = dout.view, p.dfinal_k_cache = dfinal_k.view, p.dfinal_v_cache = dfinal_v.view;
    p.dq = dq.view, p.dk = dk.view, p.dv = dv.view;
  }

  int64_t seen(int64_t n) const { return c.positions.empty() ? 0 : c.positions[n]; }

  // Row-major row number of token t (or slot) of sequence n.
  int64_t token(int64_t n, int64_t t, int64_t h) const { return (starts[n] + t) * c.H + h; }
  int64_t slot(int64_t n, int64_t position, int64_t h) const {
    return (n * c.W + position % c.W) * c.H + h;
  }

  void fill_slots(std::mt19937& random, Tensor& a, Tensor& b, int64_t n, int64_t seen) const {
    std::normal_distribution<double> normal;
    for (int64_t at = std::max<int64_t>(0, seen - c.W); at < seen; ++at) {
      for (int64_t i = 0; i < c.H * c.V; ++i) {
        a.set(slot(n, at, 0) * c.V + i, normal(random));
        b.set(slot(n, at, 0) * c.V + i, normal(random));
      }
    }
  }

  void run(ParallelFor parallel = {}) {
    expect_ok(cpu::sliding_window_attention(p, parallel));
    expect_ok(cpu::sliding_window_attention_backward(p, parallel));
  }
};

struct Expected {
  Values out, lse, final_k, final_v, dq, dk, dv, dring_k, dring_v;

  explicit Expected(const Call& x) {
    const int64_t V = x.c.V, W = x.c.W;
    const Values q = x.q.values(), k = x.k.values(), v = x.v.values(), dout = x.dout.values();
    const Values ring_k = x.ring_k.values(), ring_v = x.ring_v.values();
    const Values dfinal_k = x.dfinal_k.values(), dfinal_v = x.dfinal_v.values();
    out = dq = dk = dv = Values(q.size()), lse = Values(q.size() / V);
    final_k = final_v = dring_k = dring_v = Values(ring_k.size());
    for (int64_t n = 0; n < x.c.sequences(); ++n) {
      const int64_t P = x.seen(n), T = x.c.lengths[n];
      for (int64_t h = 0; h < x.c.H; ++h) {
        // Rows of the key of absolute position `at`, its value, and their gradients.
        const auto pick = [&](int64_t at, auto& token, auto& ring) {
          return at >= P ? &token[x.token(n, at - P, h) * V] : &ring[x.slot(n, at, h) * V];
        };
        for (int64_t t = P; t < P + T; ++t) {
          const int64_t row = x.token(n, t - P, h) * V, first = std::max<int64_t>(0, t - W + 1);
          Values weight, dweight;
          double max = -HUGE_VAL, sum = 0, delta = 0;
          for (int64_t s = first; s <= t; ++s) {
            const double *key = pick(s, k, ring_k), *value = pick(s, v, ring_v);
            double score = 0, gradient = 0;
            for (int64_t i = 0; i < V; ++i) score += x.c.scale * q[row + i] * key[i];
            for (int64_t i = 0; i < V; ++i) gradient += dout[row + i] * value[i];
            weight.push_back(score), dweight.push_back(gradient);
            max = std::max(max, score);
          }
          for (double& w : weight) sum += w = std::exp(w - max);
          lse[row / V] = max + std::log(sum);
          for (size_t j = 0; j < weight.size(); ++j) delta += (weight[j] /= sum) * dweight[j];
          for (int64_t s = first; s <= t; ++s) {
            const double *key = pick(s, k, ring_k), *value = pick(s, v, ring_v);
            double *dkey = pick(s, dk, dring_k), *dvalue = pick(s, dv, dring_v);
            const double w = weight[s - first], dscore = w * (dweight[s - first] - delta);
            for (int64_t i = 0; i < V; ++i) {
              out[row + i] += w * value[i];
              dq[row + i] += x.c.scale * dscore * key[i];
              dkey[i] += x.c.scale * dscore * q[row + i];
              dvalue[i] += w * dout[row + i];
            }
          }
        }
        for (int64_t s = std::max<int64_t>(0, P + T - W); s < P + T; ++s) {
          for (int64_t i = 0, at = x.slot(n, s, h) * V; i < V; ++i) {
            final_k[at + i] = pick(s, k, ring_k)[i];
            final_v[at + i] = pick(s, v, ring_v)[i];
            pick(s, dk, dring_k)[i] += dfinal_k[at + i];
            pick(s, dv, dring_v)[i] += dfinal_v[at + i];
          }
        }
      }
    }
  }
};

void check(DType dtype, const Case& c) {
  SCOPED_TRACE(name(dtype) + " T=" + std::to_string(c.lengths[0]) + " W=" + std::to_string(c.W) +
               " V=" + std::to_string(c.V) + " N=" + std::to_string(c.sequences()));
  std::mt19937 random(7);
  Call x(random, dtype, c);
  x.run();
  const Expected e(x);
  const double forward = forward_tolerance(dtype), gradient = gradient_tolerance(dtype);
  expect_close("out", x.out, e.out, forward);
  expect_close("lse", x.lse, e.lse, dtype == DType::kFloat64 ? 1e-12 : 5e-6);
  expect_close("final_k_cache", x.final_k, e.final_k, 0);
  expect_close("final_v_cache", x.final_v, e.final_v, 0);
  for (int64_t n = 0; n < c.sequences(); ++n) {
    EXPECT_EQ(x.final_positions.get(n), static_cast<double>(x.seen(n) + c.lengths[n]));
  }
  expect_close("dq", x.dq, e.dq, gradient);
  expect_close("dk", x.dk, e.dk, gradient);
  expect_close("dv", x.dv, e.dv, gradient);
  if (c.positions.empty()) return;
  expect_close("dinitial_k_cache", x.dring_k, e.dring_k, gradient);
  expect_close("dinitial_v_cache", x.dring_v, e.dring_v, gradient);
}

const Layout kStrided = Layout::kStrided;
constexpr int64_t kFar = int64_t{1} << 52;

TEST(SlidingWindow, EveryLengthAndWindow) {
  for (int64_t T : kSeqlens) {
    for (int64_t W : {1, 2, 5, 64, 65, 128}) {
      check(DType::kFloat64, {{T}, 2, 5, W, {}});
      for (int64_t P : {int64_t{0}, int64_t{1}, W - 1, W, W + 3, kFar}) {
        check(DType::kFloat64, {{T}, 1, 5, W, {P}});
      }
    }
  }
}

TEST(SlidingWindow, EveryTypeAndWidth) {
  for (DType dtype : kDTypes) {
    for (int64_t V : {1, 16, 64, 80}) {
      check(dtype, {{150, 150}, 2, V, 64, {40, kFar}, false, kStrided});
      check(dtype, {{257}, 1, V, 128, {}});
    }
    check(dtype, {{700}, 1, 64, 400, {1000}});
    check(dtype, {{300}, 1, 8, 100000, {}, false, kStrided, 1.5});
  }
}

TEST(SlidingWindow, PackedSequences) {
  const std::vector<int64_t> many(130, 1);
  for (DType dtype : {DType::kFloat32, DType::kFloat64}) {
    check(dtype, {{0, 3, 64, 0, 129, 1, 63, 0}, 2, 5, 16, {}, true});
    check(dtype, {{0, 3, 64, 0, 129, 1}, 2, 5, 16, {5, 16, 7, 0, kFar, 17}, true, kStrided});
    check(dtype, {many, 1, 5, 4, {}, true});
    check(dtype, {{0, 0}, 1, 5, 4, {2, 9}, true});
  }
}

// The tokens [begin, end) of a (B, T, ...) view.
TensorView slice(TensorView view, int64_t begin, int64_t end) {
  view.data = static_cast<char*>(view.data) + begin * view.stride[1] * element_size(view.dtype);
  view.size[1] = end - begin;
  return view;
}

TEST(SlidingWindow, SplitAnywhereEqualsWhole) {
  std::mt19937 random(1);
  const int64_t T = 15;
  for (int64_t W : {1, 4, 20}) {
    for (int64_t cut = 0; cut <= T; ++cut) {
      Call x(random, DType::kFloat64, {{T, T}, 2, 5, W, {3, 9}, false, kStrided});
      x.run();
      const Values out = x.out.values(), ring = x.final_k.values(), at = x.final_positions.values();
      Tensor middle_k = x.final_k, middle_v = x.final_v, middle_positions = x.final_positions;
      SlidingWindowParams head = x.p, tail = x.p;
      for (auto tensor : {&SlidingWindowParams::q, &SlidingWindowParams::k, &SlidingWindowParams::v,
                          &SlidingWindowParams::out, &SlidingWindowParams::lse}) {
        head.*tensor = slice(x.p.*tensor, 0, cut);
        tail.*tensor = slice(x.p.*tensor, cut, T);
      }
      head.final_k_cache = tail.initial_k_cache = middle_k.view;
      head.final_v_cache = tail.initial_v_cache = middle_v.view;
      head.final_positions = tail.initial_positions = middle_positions.view;
      expect_ok(cpu::sliding_window_attention(head));
      expect_ok(cpu::sliding_window_attention(tail));
      expect_close("out", x.out, out, 1e-14);
      expect_close("final_k_cache", x.final_k, ring, 0);
      expect_close("final_positions", x.final_positions, at, 0);
    }
  }
}

// Every token of two sequences, one at a time, through slots 2 and 0 of a pool; row 1 is skipped.
TEST(SlidingWindow, DecodeEqualsWhole) {
  for (DType dtype : kDTypes) {
    for (int64_t W : {1, 4, 100, 300}) {
      std::mt19937 random(2);
      const int64_t T = W + 9, H = 2, V = 24;
      Call x(random, dtype, {{T, T, T}, H, V, W, {kFar, 0, 2}, false, kStrided});
      x.run();
      Tensor k_cache(dtype, {4, W, H, V}, kStrided), v_cache = k_cache;  // NaN where unwritten
      const int64_t slots[] = {2, -1, 0}, ring = W * H * V;
      for (int64_t n : {0, 2}) {
        for (int64_t i = 0; i < ring; ++i) {
          k_cache.set(slots[n] * ring + i, x.ring_k.get(n * ring + i));
          v_cache.set(slots[n] * ring + i, x.ring_v.get(n * ring + i));
        }
      }
      const Tensor indices = index_tensor(DType::kInt32, {2, -1, 0});
      Tensor out(dtype, {3, H, V}), step[] = {out, out, out};
      for (int64_t t = 0; t < T; ++t) {
        const Tensor positions = index_tensor(DType::kInt64, {kFar + t, 0, 2 + t});
        Values expected(3 * H * V);
        for (int64_t i = 0; i < 3 * H * V; ++i) {
          const int64_t at = (i / (H * V) * T + t) * H * V + i % (H * V);
          step[0].set(i, x.q.get(at)), step[1].set(i, x.k.get(at)), step[2].set(i, x.v.get(at));
          if (i / (H * V) != 1) expected[i] = x.out.get(at);
        }
        SlidingWindowDecodeParams p;
        p.q = step[0].view, p.k = step[1].view, p.v = step[2].view, p.out = out.view;
        p.k_cache = k_cache.view, p.v_cache = v_cache.view, p.scale = x.c.scale;
        p.positions = positions.view, p.state_indices = indices.view;
        expect_ok(cpu::sliding_window_decode(p));
        expect_close("out", out, expected, forward_tolerance(dtype));
      }
      for (int64_t i = 0; i < ring; ++i) {
        ASSERT_EQ(k_cache.get(2 * ring + i), x.final_k.get(i));
        ASSERT_EQ(v_cache.get(i), x.final_v.get(2 * ring + i));
        ASSERT_TRUE(std::isnan(k_cache.get(ring + i)) && std::isnan(v_cache.get(3 * ring + i)));
      }
    }
  }
}

// A NaN token reaches the queries that see it and nothing else; so do its gradients.
TEST(SlidingWindow, NaNStaysWithItsWindow) {
  std::mt19937 random(3);
  const int64_t T = 200, W = 40, P = 100, bad = 90;
  Call x(random, DType::kFloat32, {{T, T}, 1, 5, W, {P, P}, false, kStrided});
  x.k.set(bad * 5, NAN), x.v.set(bad * 5 + 1, NAN), x.q.set((bad + 60) * 5, NAN);
  const int64_t oldest = P % W * 5;  // the slot that no new query sees
  x.ring_k.set(oldest, NAN), x.ring_v.set(oldest, NAN);
  x.run();
  const auto finite = [](const Tensor& tensor, int64_t row) {
    double sum = 0;
    for (int64_t i = 0; i < 5; ++i) sum += tensor.get(row * 5 + i);
    return std::isfinite(sum);
  };
  for (int64_t t = 0; t < 2 * T; ++t) {
    const bool sees = (t >= bad && t < bad + W) || t == bad + 60;
    EXPECT_EQ(finite(x.out, t), !sees) << t;
    EXPECT_EQ(finite(x.dq, t), !sees) << t;
    const bool seen = (t > bad - W && t < bad + W) || (t > bad + 60 - W && t <= bad + 60);
    EXPECT_EQ(finite(x.dk, t), !seen) << t;
    EXPECT_EQ(finite(x.dv, t), !seen) << t;
  }
  for (int64_t slot = 0; slot < 2 * W; ++slot) EXPECT_TRUE(finite(x.dring_k, slot)) << slot;
}

TEST(SlidingWindow, LargeScores) {
  std::mt19937 random(4);
  Call x(random, DType::kFloat64, {{300}, 1, 16, 70, {100}, false, kStrided, 1000.0});
  x.run();
  const Expected e(x);
  expect_close("out", x.out, e.out, 1e-11);  // scores of 1e4 have lost four digits
  expect_close("dk", x.dk, e.dk, 1e-11);
}

TEST(SlidingWindow, SameResultOnAnyNumberOfThreads) {
  std::mt19937 random(5);
  Call x(random, DType::kFloat32, {{70, 0, 200, 3}, 3, 16, 30, {4, 5, 6, 70}, true});
  int one = 1, five = 5;
  x.run(threads(one));
  const Tensor out = x.out, dq = x.dq, dk = x.dk, dring_v = x.dring_v;
  x.run(threads(five));
  EXPECT_EQ(out.bytes, x.out.bytes);
  EXPECT_EQ(dq.bytes, x.dq.bytes);
  EXPECT_EQ(dk.bytes, x.dk.bytes);
  EXPECT_EQ(dring_v.bytes, x.dring_v.bytes);
}

TEST(SlidingWindow, NamesWhatIsWrong) {
  std::mt19937 random(6);
  const auto error = [&](auto&& change, const char* expected) {
    Call x(random, DType::kFloat32, {{9}, 2, 4, 5, {3}});
    change(x.p);
    expect_error(cpu::sliding_window_attention(x.p), expected);
  };
  using Params = SlidingWindowBackwardParams;
  error([](Params& p) { p.window = 0; }, "sliding_window_attention: window: expected");
  error([](Params& p) { p.k.size[2] = 1; }, "sliding_window_attention: k: expected");
  error([](Params& p) { p.initial_v_cache.rank = -1; }, "initial_v_cache: expected");
  error([](Params& p) { p.final_k_cache.size[1] = 6; }, "final_k_cache: expected");
  error([](Params& p) { *static_cast<int64_t*>(p.initial_positions.data) = -1; },
        "initial_positions: expected entries >= 0, got -1");
}

}  // namespace
}  // namespace based::testing
