// The building blocks of the CPU kernels: conversions, exp and the banded product.
#define BASED_ISA generic
#include "cpu/exp.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"
#include "testing.h"

#if defined(__x86_64__)
#define DECLARE_GEMM(isa)                                                                       \
  namespace based::cpu::isa {                                                                   \
  struct Columns {                                                                              \
    int64_t begin, end;                                                                         \
    int begin_step = 0, end_step = 0;                                                           \
  };                                                                                            \
  template <class T>                                                                            \
  void gemm(int64_t M, int64_t N, Columns columns, const T* a, int64_t a_row, int64_t a_column, \
            const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate);                       \
  }
DECLARE_GEMM(avx2)  // as in cpu/gemm.h, which can be included for one instruction set only
DECLARE_GEMM(avx512)
#endif

namespace based::testing {
namespace {

using namespace cpu::generic;

float as_float(uint32_t bits) { return from_bits(bits); }

void expect_decoded(DType dtype, const SmallFloat& format) {
  std::vector<uint16_t> bits(1 << 16);
  std::vector<float> values(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  load(values.data(), bits.data(), dtype, 0, static_cast<int64_t>(bits.size()));
  for (size_t i = 0; i < bits.size(); ++i) {
    const double expected = format.decode(bits[i]);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(values[i])) << i;
    } else {
      ASSERT_EQ(to_bits(values[i]), to_bits(static_cast<float>(expected))) << i;
    }
  }
}

// Every representable value, every midpoint between two, and a float step around both.
void expect_encoded(DType dtype, const SmallFloat& format) {
  std::vector<float> values = {INFINITY, -INFINITY, NAN, -NAN, as_float(0x7f800001), 3.4e38f};
  for (int bits = 0; bits < 1 << 16; ++bits) {
    const double here = format.decode(static_cast<uint16_t>(bits));
    const double next = format.decode(static_cast<uint16_t>(bits + 1));
    for (double x : {here, (here + next) / 2}) {
      if (std::isnan(x) || std::isinf(x)) continue;
      const float f = static_cast<float>(x);
      for (float y : {f, std::nextafter(f, INFINITY), std::nextafter(f, -INFINITY)}) {
        values.push_back(y);
      }
    }
  }
  std::mt19937 random(0);
  for (int i = 0; i < 1 << 18; ++i) values.push_back(as_float(static_cast<uint32_t>(random())));
  std::vector<uint16_t> bits(values.size() + 3, 0xffff);
  store(bits.data(), dtype, 3, values.data(), static_cast<int64_t>(values.size()));
  EXPECT_EQ(bits[2], 0xffff);
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isnan(values[i])) {
      EXPECT_TRUE(std::isnan(format.decode(bits[3 + i])));
    } else {
      ASSERT_EQ(bits[3 + i], format.encode(values[i])) << values[i];
    }
  }
}

TEST(Primitives, BFloat16Conversions) {
  expect_decoded(DType::kBFloat16, kBFloat16Format);
  expect_encoded(DType::kBFloat16, kBFloat16Format);
}

TEST(Primitives, Float16Conversions) {
  expect_decoded(DType::kFloat16, kFloat16Format);
  expect_encoded(DType::kFloat16, kFloat16Format);
}

TEST(Primitives, Exp) {
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 1009) {
    const float x = as_float(static_cast<uint32_t>(bits)), got = exp_fast(x);
    if (std::isnan(x)) {
      EXPECT_TRUE(std::isnan(got));
      continue;
    }
    const double exact = std::exp(static_cast<double>(x));
    if (exact > std::numeric_limits<float>::max()) {
      EXPECT_EQ(got, INFINITY) << x;
    } else {  // 1 ulp is at most 2^-23 of a normal number, 2^-149 of any other
      const double ulp = std::ldexp(1, std::max(exact > 0 ? std::ilogb(exact) : -126, -126) - 23);
      ASSERT_LE(std::fabs(got - exact), 1.2 * ulp) << x;
    }
  }
  EXPECT_EQ(exp_fast(0.0f), 1.0f);
  EXPECT_EQ(exp_fast(-INFINITY), 0.0f);
  EXPECT_EQ(exp_fast(INFINITY), INFINITY);
}

// Every shape of band on M x K, with NaN in A outside of it and in one row of B: rows of C whose
// band leaves that row out stay finite.
template <class T, class Columns, class GemmFn>
void check_gemm(int64_t lanes, const GemmFn& gemm) {
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  const Columns bands[] = {{0, 17}, {4, 5}, {3, 3}, {0, 1, 0, 1}, {0, 17, 1, 0}, {2, 4, 1, 1}};
  for (const Columns& band : bands) {
    for (int64_t M : {1, 2, 5, 6, 7, 13}) {
      for (int64_t N : {lanes, 3 * lanes, 9 * lanes}) {
        for (int mode = 0; mode < 4; ++mode) {
          const bool accumulate = mode & 1, transposed = mode & 2;
          const int64_t K = 17, ldb = N + 3, ldc = N + 5;
          const int64_t a_row = transposed ? 1 : K + 2, a_column = transposed ? M + 2 : 1;
          std::vector<T> a(20 * 20, T(NAN)), b(K * ldb, T(NAN)), c(M * ldc, T(-7)), expected;
          const int64_t poisoned = 4;  // row of B
          for (int64_t k = 0; k < K; ++k) {
            for (int64_t n = 0; n < N && k != poisoned; ++n) b[k * ldb + n] = T(normal(random));
          }
          for (T& x : c) x = T(normal(random));
          expected = c;
          for (int64_t m = 0; m < M; ++m) {
            const int64_t begin = band.begin + m * band.begin_step;
            const int64_t end = band.end + m * band.end_step;
            for (int64_t k = begin; k < end; ++k) a[m * a_row + k * a_column] = T(normal(random));
            for (int64_t n = 0; n < N; ++n) {
              double sum = accumulate ? double(c[m * ldc + n]) : 0;
              for (int64_t k = begin; k < end; ++k) {
                sum += double(a[m * a_row + k * a_column]) * double(b[k * ldb + n]);
              }
              expected[m * ldc + n] = T(sum);
            }
          }
          gemm(M, N, band, a.data(), a_row, a_column, b.data(), ldb, c.data(), ldc, accumulate);
          for (size_t i = 0; i < c.size(); ++i) {
            ASSERT_EQ(std::isnan(c[i]), std::isnan(expected[i])) << "M" << M << " N" << N;
            if (std::isnan(c[i])) continue;
            ASSERT_NEAR(c[i], expected[i], sizeof(T) == 8 ? 1e-13 : 1e-5);
          }
        }
      }
    }
  }
}

TEST(Primitives, BandedProductGeneric) {
  check_gemm<float, cpu::generic::Columns>(4, cpu::generic::gemm<float>);
  check_gemm<double, cpu::generic::Columns>(2, cpu::generic::gemm<double>);
}

#if defined(__x86_64__)
TEST(Primitives, BandedProductAvx2) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    GTEST_SKIP() << "no AVX2 here";
  check_gemm<float, cpu::avx2::Columns>(8, cpu::avx2::gemm<float>);
  check_gemm<double, cpu::avx2::Columns>(4, cpu::avx2::gemm<double>);
}

TEST(Primitives, BandedProductAvx512) {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw"))
    GTEST_SKIP() << "no AVX-512";
  check_gemm<float, cpu::avx512::Columns>(16, cpu::avx512::gemm<float>);
  check_gemm<double, cpu::avx512::Columns>(8, cpu::avx512::gemm<double>);
}
#endif

}  // namespace
}  // namespace based::testing
