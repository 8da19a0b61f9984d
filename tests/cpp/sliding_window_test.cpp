// Sliding-window attention against its definition in fp64: one query at a time, over all keys.
#include <cmath>
#include <numeric>

#include "testing.h"

namespace based::testing {
namespace {

struct Case {
  std::vector<int64_t> lengths;  // of the sequences; all equal unless packed
  int64_t H, V, W;
  std::vector<int64_t> positions;  // of the initial rings; empty: no initial ring
  bool packed = false;
  Layout layout = Layout::kContiguous;
  double scale = 0.25;
};

// The tensors of one call. Outputs, slots never written and the gradients of those are NaN. k and v
// have a mean, which the gradient of q is sensitive to.
struct Call {
  const Case c;
  const int64_t N;
  SlidingWindowBackwardParams p;
  Tensor q, k, v, cu_seqlens, ring_k, ring_v, positions, dout, dfinal_k, dfinal_v;
  Tensor out, lse, final_k, final_v, final_positions, dq, dk, dv, dring_k, dring_v;
  std::vector<int64_t> starts = {0};

  Call(std::mt19937& random, DType dtype, const Case& shape) : c(shape), N(c.lengths.size()) {
    for (int64_t length : c.lengths) starts.push_back(starts.back() + length);
    const int64_t B = c.packed ? 1 : N, T = c.packed ? starts.back() : c.lengths[0];
    const auto input = [&](Tensor& tensor, double mean) {
      tensor = random_tensor(random, dtype, {B, T, c.H, c.V}, c.layout, mean);
      return tensor.view;
    };
    const auto output = [&](Tensor& tensor) {
      return (tensor = Tensor(dtype, {B, T, c.H, c.V}, c.layout)).view;
    };
    const auto ring = [&](Tensor& tensor, int64_t added, bool filled) {
      tensor = Tensor(dtype, {N, c.W, c.H, c.V}, c.layout);
      std::normal_distribution<double> normal;
      for (int64_t n = 0; filled && n < N; ++n) {
        const int64_t end = seen(n) + added * c.lengths[n];
        for (int64_t at = std::max<int64_t>(0, end - c.W); at < end; ++at) {
          for (int64_t i = 0; i < c.H * c.V; ++i)
            tensor.set(slot(n, at, 0) * c.V + i, normal(random));
        }
      }
      return tensor.view;
    };
    p.q = input(q, 0), p.k = input(k, 1), p.v = input(v, 1), p.dout = input(dout, 0.1);
    p.out = output(out), p.dq = output(dq), p.dk = output(dk), p.dv = output(dv);
    p.lse = (lse = Tensor(accumulator(dtype), {B, T, c.H}, c.layout)).view;
    if (c.packed) p.cu_seqlens = (cu_seqlens = index_tensor(DType::kInt32, starts)).view;
    p.initial_k_cache = ring(ring_k, 0, true), p.initial_v_cache = ring(ring_v, 0, true);
    p.dinitial_k_cache = ring(dring_k, 0, false), p.dinitial_v_cache = ring(dring_v, 0, false);
    p.initial_positions = (positions = index_tensor(DType::kInt64, c.positions)).view;
    if (c.positions.empty()) {
      p.initial_k_cache = p.initial_v_cache = p.initial_positions = {};
      p.dinitial_k_cache = p.dinitial_v_cache = {};
    }
    p.final_k_cache = ring(final_k, 1, false), p.final_v_cache = ring(final_v, 1, false);
    p.dfinal_k_cache = ring(dfinal_k, 1, true), p.dfinal_v_cache = ring(dfinal_v, 1, true);
    p.final_positions = (final_positions = Tensor(DType::kInt64, {N})).view;
    p.window = c.W, p.scale = c.scale;
  }

  Call(const Call&) = delete;

  int64_t seen(int64_t n) const { return c.positions.empty() ? 0 : c.positions[n]; }

  // Row-major row number of a token, or of the slot of an absolute position.
  int64_t token(int64_t n, int64_t t, int64_t h) const { return (starts[n] + t) * c.H + h; }
  int64_t slot(int64_t n, int64_t position, int64_t h) const {
    return (n * c.W + position % c.W) * c.H + h;
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
    final_k = final_v = dring_k = dring_v = Values(dfinal_k.size());
    for (int64_t n = 0; n < x.N; ++n) {
      const int64_t P = x.seen(n), T = x.c.lengths[n];
      for (int64_t h = 0; h < x.c.H; ++h) {
        // The row of the key of absolute position `at`; of its value, of their gradients.
        const auto pick = [&](int64_t at, auto& token, auto& ring) {
          return at >= P ? &token[x.token(n, at - P, h) * V] : &ring[x.slot(n, at, h) * V];
        };
        for (int64_t t = P; t < P + T; ++t) {
          const int64_t row = x.token(n, t - P, h) * V, first = std::max<int64_t>(0, t - W + 1);
          Values weight, dweight;
          double max = -HUGE_VAL, sum = 0, delta = 0;
          for (int64_t s = first; s <= t; ++s) {
            const double *key = pick(s, k, ring_k), *value = pick(s, v, ring_v);
            weight.push_back(x.c.scale * std::inner_product(key, key + V, &q[row], 0.0));
            dweight.push_back(std::inner_product(value, value + V, &dout[row], 0.0));
            max = std::max(max, weight.back());
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
               " V=" + std::to_string(c.V) + " N=" + std::to_string(c.lengths.size()));
  std::mt19937 random(7);
  Call x(random, dtype, c);
  x.run();
  const Expected e(x);
  const double forward = forward_tolerance(dtype), gradient = gradient_tolerance(dtype);
  expect_close("out", x.out, e.out, forward);
  expect_close("lse", x.lse, e.lse, dtype == DType::kFloat64 ? 1e-12 : 5e-6);
  expect_close("final_k_cache", x.final_k, e.final_k, 0);
  expect_close("final_v_cache", x.final_v, e.final_v, 0);
  for (int64_t n = 0; n < x.N; ++n) {
    EXPECT_EQ(x.final_positions.get(n), static_cast<double>(x.seen(n) + c.lengths[n]));
  }
  expect_close("dq", x.dq, e.dq, gradient);
  expect_close("dk", x.dk, e.dk, gradient);
  expect_close("dv", x.dv, e.dv, gradient);
  if (!c.positions.empty()) {
    expect_close("dinitial_k_cache", x.dring_k, e.dring_k, gradient);
    expect_close("dinitial_v_cache", x.dring_v, e.dring_v, gradient);
  }
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
  check(DType::kFloat64, {{300}, 1, 16, 70, {100}, false, kStrided, 60.0});  // e^score overflows
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

// The four blocks of a tensor in reverse order: row b of a call meets slot 3 - b of a pool.
Values reversed(const Values& values) {
  Values result;
  for (int64_t n = 3, size = values.size() / 4; n >= 0; --n) {
    result.insert(result.end(), &values[n * size], &values[n * size] + size);
  }
  return result;
}

TEST(SlidingWindow, DecodeIsOneMoreToken) {
  std::mt19937 random(2);
  for (DType dtype : kDTypes) {
    for (int64_t W : {1, 4, 100, 300}) {
      for (int64_t P : {int64_t{0}, W - 1, W, W + 30, kFar}) {
        Call x(random, dtype, {{1, 1, 1, 1}, 2, 24, W, {P, 0, P, P / 2}, false, kStrided});
        Expected e(x);
        Tensor k_pool = x.ring_k, v_pool = x.ring_v,
               skip = index_tensor(DType::kInt32, {3, -1, 1, 0});
        k_pool.assign(reversed(x.ring_k.values())), v_pool.assign(reversed(x.ring_v.values()));
        SlidingWindowDecodeParams p;
        const auto row = [](TensorView view) {  // (4, 1, H, V) -> (4, H, V)
          view.size[1] = view.size[2], view.stride[1] = view.stride[2];
          view.size[2] = view.size[3], view.stride[2] = 1, view.rank = 3;
          return view;
        };
        p.q = row(x.p.q), p.k = row(x.p.k), p.v = row(x.p.v), p.out = row(x.p.out);
        p.k_cache = k_pool.view, p.v_cache = v_pool.view, p.positions = x.positions.view;
        p.state_indices = skip.view, p.scale = x.c.scale;
        expect_ok(cpu::sliding_window_decode(p));
        for (int64_t i = 48; i < 96; ++i) e.out[i] = 0;  // row 1
        expect_close("out", x.out, e.out, forward_tolerance(dtype));
        const Values k_ring = reversed(k_pool.values()), v_ring = reversed(v_pool.values());
        for (int64_t i = 0; i < k_pool.count(); ++i) {  // slots never written are still NaN
          const bool written = i / 48 % W < (i / 48 / W == 1 ? 0 : x.c.positions[i / 48 / W] + 1);
          ASSERT_TRUE(written ? k_ring[i] == e.final_k[i] : std::isnan(k_ring[i])) << i;
          ASSERT_TRUE(written ? v_ring[i] == e.final_v[i] : std::isnan(v_ring[i])) << i;
        }
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
  x.p.final_k_cache = x.p.final_v_cache = x.p.final_positions = {};  // all optional
  x.p.dfinal_k_cache = x.p.dfinal_v_cache = {};
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

TEST(SlidingWindow, SameResultOnAnyNumberOfThreads) {
  std::mt19937 random(5);
  Call x(random, DType::kFloat32, {{70, 0, 200, 3}, 3, 16, 30, {4, 5, 6, 70}, true});
  int one = 1, five = 5;
  x.run(threads(one));
  const Tensor before[] = {x.out, x.dq, x.dk, x.dring_v};
  x.run(threads(five));
  const Tensor after[] = {x.out, x.dq, x.dk, x.dring_v};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(before[i].bytes, after[i].bytes);
}

TEST(SlidingWindow, NamesWhatIsWrong) {
  std::mt19937 random(6);
  Call x(random, DType::kFloat32, {{9}, 2, 4, 5, {3}});
  SlidingWindowParams window = x.p, heads = x.p, cache = x.p, ring = x.p;
  window.window = 0, heads.k.size[2] = 1, cache.initial_v_cache.rank = -1;
  ring.final_k_cache.size[1] = 6;
  const std::string op = "sliding_window_attention: ";
  expect_error(cpu::sliding_window_attention(window), op + "window: expected an integer >= 1");
  expect_error(cpu::sliding_window_attention(heads), op + "k: expected");
  expect_error(cpu::sliding_window_attention(cache), op + "initial_v_cache: expected");
  expect_error(cpu::sliding_window_attention(ring), op + "final_k_cache: expected");
  x.positions.set(0, -1);
  expect_error(cpu::sliding_window_attention(x.p), "initial_positions: expected entries >= 0");
}

}  // namespace
}  // namespace based::testing
