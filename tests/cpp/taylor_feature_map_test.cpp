// The Taylor feature map against its definition in double.
#include "taylor_reference.h"

namespace based::testing {
namespace {

void check(const std::vector<int64_t>& leading, int64_t D, DType dtype, Layout layout,
           double scale) {
  SCOPED_TRACE("D" + std::to_string(D) + " " + name(dtype) + " rank " +
               std::to_string(leading.size() + 1));
  std::mt19937 random(static_cast<unsigned>(D));
  std::vector<int64_t> narrow = leading, wide = leading;
  narrow.push_back(D), wide.push_back(expanded_dim(D));
  const Tensor x = random_tensor(random, dtype, narrow, layout);
  const Tensor dout = random_tensor(random, dtype, wide, layout);
  Tensor out(dtype, wide, layout), dx(dtype, narrow, layout);
  TaylorFeatureMapBackwardParams p;
  p.x = x.view, p.out = out.view, p.dout = dout.view, p.dx = dx.view, p.scale = scale;

  const int64_t F = expanded_dim(D), count = x.count() / D;
  const Values inputs = x.values(), douts = dout.values();
  Values expected, gradient(x.count());
  for (int64_t i = 0; i < count; ++i) {
    const Values phi = taylor_map(&inputs[i * D], D, scale);
    ASSERT_EQ(static_cast<int64_t>(phi.size()), F);
    expected.insert(expected.end(), phi.begin(), phi.end());
    add_taylor_gradient(&inputs[i * D], D, scale, &douts[i * F], &gradient[i * D]);
  }
  expect_ok(cpu::taylor_feature_map(p));
  expect_close("out", out, expected, forward_tolerance(dtype));
  expect_ok(cpu::taylor_feature_map_backward(p));
  expect_close("dx", dx, gradient, gradient_tolerance(dtype));
}

TEST(TaylorFeatureMap, EveryWidthAndDtype) {
  for (DType dtype : kDTypes) {
    for (int64_t D : {1, 2, 3, 4, 5, 8, 15, 16, 24, 33}) {
      check({2, 33, 2}, D, dtype, Layout::kStrided, 0.7);
    }
  }
}

TEST(TaylorFeatureMap, EveryCountOfVectors) {
  for (int64_t count : kSeqlens) {
    for (DType dtype : kDTypes) check({count}, 6, dtype, Layout::kContiguous, 2);
  }
}

TEST(TaylorFeatureMap, EveryRank) {
  for (Layout layout : {Layout::kContiguous, Layout::kStrided}) {
    check({}, 7, DType::kFloat32, layout, 1);
    check({5}, 7, DType::kFloat32, layout, 1);
    check({5, 3}, 7, DType::kFloat32, layout, 1);
    check({5, 3, 70}, 7, DType::kFloat32, layout, 1);
    check({5, 0, 2}, 7, DType::kFloat32, layout, 1);
  }
}

TEST(TaylorFeatureMap, ProductOfMapsIsTheTaylorPolynomial) {
  std::mt19937 random(1);
  for (int64_t D : {1, 2, 5, 16}) {
    const int64_t F = expanded_dim(D);
    const Tensor x = random_tensor(random, DType::kFloat64, {2, D});
    Tensor out(DType::kFloat64, {2, F});
    TaylorFeatureMapParams p;
    p.x = x.view, p.out = out.view, p.scale = 0.3;
    expect_ok(cpu::taylor_feature_map(p));
    double product = 0, score = 0;
    for (int64_t f = 0; f < F; ++f) product += out.get(f) * out.get(F + f);
    for (int64_t i = 0; i < D; ++i) score += 0.3 * x.get(i) * x.get(D + i);
    EXPECT_NEAR(product, 1 + score + score * score / 2, 1e-12);
  }
}

TEST(TaylorFeatureMap, NanStaysInItsVector) {
  std::mt19937 random(2);
  const int64_t D = 4, F = expanded_dim(D), count = 10;
  Tensor x = random_tensor(random, DType::kFloat32, {count, D});
  Tensor dout = random_tensor(random, DType::kFloat32, {count, F});
  x.set(5 * D, NAN), dout.set(5 * F, NAN);
  Tensor out(DType::kFloat32, {count, F}), dx(DType::kFloat32, {count, D});
  TaylorFeatureMapBackwardParams p;
  p.x = x.view, p.out = out.view, p.dout = dout.view, p.dx = dx.view;
  expect_ok(cpu::taylor_feature_map(p));
  expect_ok(cpu::taylor_feature_map_backward(p));
  for (int64_t i = 0; i < count; ++i) {
    if (i == 5) continue;
    for (int64_t f = 0; f < F; ++f) EXPECT_FALSE(std::isnan(out.get(i * F + f)));
    for (int64_t j = 0; j < D; ++j) EXPECT_FALSE(std::isnan(dx.get(i * D + j)));
  }
}

TEST(TaylorFeatureMap, NamedErrors) {
  const Tensor x(DType::kFloat32, {3, 4});
  const Tensor wide(DType::kFloat32, {3, 15}), narrow(DType::kFloat32, {3, 14});
  const Tensor integers(DType::kInt32, {3, 4});
  TaylorFeatureMapBackwardParams good;
  good.x = good.dx = x.view, good.out = good.dout = wide.view;
  const auto fails = [&](const char* part, auto&& spoil) {
    TaylorFeatureMapBackwardParams p = good;
    spoil(p);
    const std::string message = part;
    const bool only_forward = message.find("out: ") == 0, only_backward = message[0] == 'd';
    if (!only_backward) {
      expect_error(cpu::taylor_feature_map(p), "taylor_feature_map: " + message);
    }
    if (!only_forward) {
      expect_error(cpu::taylor_feature_map_backward(p), "taylor_feature_map_backward: " + message);
    }
  };
  fails("x: ", [](auto& p) { p.x = TensorView(); });
  fails("x: ", [&](auto& p) { p.x = integers.view; });
  fails("x: expected a contiguous last dimension", [](auto& p) { p.x.stride[1] = 2; });
  fails("scale: ", [](auto& p) { p.scale = 0; });
  fails("scale: ", [](auto& p) { p.scale = NAN; });
  fails("out: ", [&](auto& p) { p.out = narrow.view; });
  fails("dout: ", [&](auto& p) { p.dout = narrow.view; });
  fails("dx: ", [](auto& p) { p.dx.dtype = DType::kFloat64; });
}

}  // namespace
}  // namespace based::testing
