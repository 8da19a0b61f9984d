// exp for loops: the float version is branch-free, so that it vectorises on every instruction set.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace based::cpu::BASED_ISA {

// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2. Within 1.1 ulp; overflows to infinity,
// underflows through the subnormals to 0, NaN stays NaN. 2^n is applied as two factors because
// 2^128 and 2^-150 are no normal floats.
inline float exp_fast(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(.) in the low bits
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, first exact
  float p = 1.9875691500e-4f;  // (e^r - 1 - r) / r^2, minimax (Cephes expf)
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float mantissa = (p * r * r + r) + 1.0f;
  const int32_t exponent = static_cast<int32_t>(to_bits(shifted) - to_bits(kRound));
  const int32_t half = exponent >> 1;
  const float first = from_bits(static_cast<uint32_t>(half + 127) << 23);
  const float second = from_bits(static_cast<uint32_t>(exponent - half + 127) << 23);
  return mantissa * first * second;
}

inline double exp_fast(double x) { return std::exp(x); }

}  // namespace based::cpu::BASED_ISA
