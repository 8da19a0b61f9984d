// Tensors for the C++ tests: contiguous or strided, poisoned with NaN until written, read and
// written as double. Shares no code with the library's own conversions.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "based/ops.h"

namespace based::testing {

using Values = std::vector<double>;  // a tensor's elements, row-major

constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
constexpr int64_t kSeqlens[] = {0, 1, 2, 3, 7, 63, 64, 65, 257};

inline std::string name(DType dtype) {
  const char* names[] = {"float32", "bfloat16", "float16", "float64", "int32", "int64"};
  return names[static_cast<int>(dtype)];
}

// States and sums: float32, or float64 for float64.
inline DType accumulator(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

inline double forward_tolerance(DType dtype) {
  const double tolerances[] = {5e-6, 4e-3, 1e-3, 1e-12};
  return tolerances[static_cast<int>(dtype)];
}

inline double gradient_tolerance(DType dtype) {
  const double tolerances[] = {2e-5, 8e-3, 2.5e-3, 1e-12};
  return tolerances[static_cast<int>(dtype)];
}

// A 16-bit float: `mantissa` explicit bits, exponents from `lowest` up.
struct SmallFloat {
  int mantissa, lowest;

  double decode(uint16_t bits) const {
    const int magnitude = bits & 0x7fff, exponent = magnitude >> mantissa;
    const int fraction = magnitude & ((1 << mantissa) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == (0x7fff >> mantissa)) {
      return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * HUGE_VAL;
    }
    if (exponent == 0) return sign * std::ldexp(fraction, lowest - mantissa);
    return sign * std::ldexp(fraction + (1 << mantissa), lowest + exponent - 1 - mantissa);
  }

  // Round to nearest even; overflow to infinity.
  uint16_t encode(double x) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const int infinity = 0x7fff >> mantissa << mantissa;
    if (std::isnan(x)) return 0x7fff;
    if (x == 0) return sign;
    const int exponent = std::isinf(x) ? 1000 : std::max(std::ilogb(x), lowest);
    const int bits = exponent > 127
                         ? infinity
                         : ((exponent - lowest) << mantissa) +
                               int(std::nearbyint(std::ldexp(std::fabs(x), mantissa - exponent)));
    return sign | static_cast<uint16_t>(std::min(bits, infinity));
  }
};

constexpr SmallFloat kBFloat16Format = {7, -126}, kFloat16Format = {10, -14};

inline int64_t element_size(DType dtype) {
  const int64_t sizes[] = {4, 2, 2, 8, 4, 8};
  return sizes[static_cast<int>(dtype)];
}

enum class Layout { kContiguous, kStrided };

struct Tensor {
  TensorView view;
  std::vector<unsigned char> bytes;  // 0xff: NaN in every floating-point type, -1 as an integer

  Tensor() = default;

  // Strided: the leading dimensions in reverse order in memory, with gaps between the rows.
  Tensor(DType dtype, const std::vector<int64_t>& sizes, Layout layout = Layout::kContiguous) {
    view.dtype = dtype;
    view.rank = static_cast<int>(sizes.size());
    const bool strided = layout == Layout::kStrided;
    int64_t span = sizes.back() + (strided ? 3 : 0);
    view.stride[view.rank - 1] = 1;
    for (int i = 0; i < view.rank; ++i) view.size[i] = sizes[i];
    for (int i = 0; i < view.rank - 1; ++i) {
      const int dim = strided ? i : view.rank - 2 - i;
      view.stride[dim] = span;
      span = span * sizes[dim] + (strided ? 5 : 0);
    }
    bytes.assign(span * element_size(dtype), 0xff);
    view.data = bytes.data();
  }

  Tensor(const Tensor& other) : view(other.view), bytes(other.bytes) { view.data = bytes.data(); }
  Tensor(Tensor&& other) : view(other.view), bytes(std::move(other.bytes)) {}
  Tensor& operator=(Tensor other) {
    bytes.swap(other.bytes);
    view = other.view;
    return *this;
  }

  int64_t count() const {
    int64_t count = 1;
    for (int i = 0; i < view.rank; ++i) count *= view.size[i];
    return count;
  }

  // Element offset of the row-major index.
  int64_t offset(int64_t index) const {
    int64_t offset = 0;
    for (int i = view.rank - 1; i >= 0; --i) {
      offset += index % view.size[i] * view.stride[i];
      index /= view.size[i];
    }
    return offset;
  }

  double get(int64_t index) const {
    const unsigned char* at = bytes.data() + offset(index) * element_size(view.dtype);
    const auto as = [&](auto value) {
      std::memcpy(&value, at, sizeof value);
      return value;
    };
    switch (view.dtype) {
      case DType::kFloat32:
        return as(float{});
      case DType::kFloat64:
        return as(double{});
      case DType::kBFloat16:
        return kBFloat16Format.decode(as(uint16_t{}));
      case DType::kFloat16:
        return kFloat16Format.decode(as(uint16_t{}));
      case DType::kInt32:
        return as(int32_t{});
      default:
        return static_cast<double>(as(int64_t{}));
    }
  }

  void set(int64_t index, double x) {
    unsigned char* at = bytes.data() + offset(index) * element_size(view.dtype);
    const auto put = [&](auto value) { std::memcpy(at, &value, sizeof value); };
    switch (view.dtype) {
      case DType::kFloat32:
        return put(static_cast<float>(x));
      case DType::kFloat64:
        return put(x);
      case DType::kBFloat16:
        return put(kBFloat16Format.encode(x));
      case DType::kFloat16:
        return put(kFloat16Format.encode(x));
      case DType::kInt32:
        return put(static_cast<int32_t>(x));
      default:
        return put(static_cast<int64_t>(x));
    }
  }

  Values values() const {
    Values values(count());
    for (int64_t i = 0; i < count(); ++i) values[i] = get(i);
    return values;
  }

  void assign(const Values& values) {
    for (int64_t i = 0; i < count(); ++i) set(i, values[i]);
  }

  // Every byte outside the elements is still poison.
  bool gaps_untouched() const {
    std::vector<unsigned char> rest = bytes;
    const int64_t size = element_size(view.dtype);
    for (int64_t i = 0; i < count(); ++i) std::memset(rest.data() + offset(i) * size, 0xff, size);
    for (unsigned char byte : rest) {
      if (byte != 0xff) return false;
    }
    return true;
  }
};

// Normally distributed elements, rounded to the dtype.
inline Tensor random_tensor(std::mt19937& random, DType dtype, const std::vector<int64_t>& sizes,
                            Layout layout = Layout::kContiguous, double mean = 0, double std = 1) {
  Tensor tensor(dtype, sizes, layout);
  std::normal_distribution<double> normal(mean, std);
  for (int64_t i = 0; i < tensor.count(); ++i) tensor.set(i, normal(random));
  return tensor;
}

inline Tensor index_tensor(DType dtype, const std::vector<int64_t>& entries) {
  Tensor tensor(dtype, {static_cast<int64_t>(entries.size())});
  for (size_t i = 0; i < entries.size(); ++i) tensor.set(i, static_cast<double>(entries[i]));
  return tensor;
}

// |got - expected| / |expected|; NaN when either holds one, |got| when expected is 0 but for the
// rounding of doubles.
inline double relative_error(const Values& got, const Values& expected) {
  if (got.size() != expected.size()) return HUGE_VAL;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm > 1e-26 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

inline void expect_ok(const Status& status) { EXPECT_TRUE(status.ok()) << status.message; }

// An output: close to `expected`, and nothing written outside of it.
inline void expect_close(const char* what, const Tensor& got, const Values& expected,
                         double tolerance) {
  EXPECT_LE(relative_error(got.values(), expected), tolerance) << what;
  EXPECT_TRUE(got.gaps_untouched()) << what;
}

// A failed call whose message holds `part`.
inline void expect_error(const Status& status, const std::string& part) {
  EXPECT_FALSE(status.ok()) << "no error; expected: " << part;
  EXPECT_NE(std::string(status.message).find(part), std::string::npos) << status.message;
}

// `parts` ranges, each on its own thread.
inline ParallelFor threads(int& parts) {
  const auto run = [](void* context, int64_t count, ParallelFor::Body body, void* argument) {
    const int64_t parts = *static_cast<int*>(context);
    std::vector<std::thread> running;
    for (int64_t i = 0; i < parts; ++i) {
      running.emplace_back(body, argument, count * i / parts, count * (i + 1) / parts);
    }
    for (std::thread& thread : running) thread.join();
  };
  return {run, &parts};
}

}  // namespace based::testing
