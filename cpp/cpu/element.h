// Rows of any element type <-> the compute type T (float for float32, bfloat16, float16; double for
// float64). Branch-free conversions, so that the loops vectorise on every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "based/types.h"

namespace based::cpu::BASED_ISA {

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

inline uint16_t float_to_bfloat16(float x) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

inline float float16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  // Rebias by an exact product, which also normalises subnormals; infinity and NaN apart.
  const uint32_t finite = to_bits(from_bits(magnitude) * from_bits(0x77800000));  // 2^112
  const uint32_t special = magnitude | 0x7f800000;
  return from_bits(sign | (magnitude >= 0x0f800000 ? special : finite));
}

inline uint16_t float_to_float16(float x) {  // round to nearest even; overflow to infinity
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 1/2 leaves the half's subnormal steps in the low bits, rounded.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000 ? special : finite));
}

// target[i] = source[offset + i], i < n.
inline void load(float* target, const void* source, DType dtype, int64_t offset, int64_t n) {
  if (dtype == DType::kFloat32) {
    std::memcpy(target, static_cast<const float*>(source) + offset, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* s = static_cast<const uint16_t*>(source) + offset;
    for (int64_t i = 0; i < n; ++i) target[i] = bfloat16_to_float(s[i]);
  } else {
    const uint16_t* s = static_cast<const uint16_t*>(source) + offset;
    for (int64_t i = 0; i < n; ++i) target[i] = float16_to_float(s[i]);
  }
}

inline void load(double* target, const void* source, DType, int64_t offset, int64_t n) {
  std::memcpy(target, static_cast<const double*>(source) + offset, n * sizeof(double));
}

// target[offset + i] = source[i], i < n, rounded once.
inline void store(void* target, DType dtype, int64_t offset, const float* source, int64_t n) {
  if (dtype == DType::kFloat32) {
    std::memcpy(static_cast<float*>(target) + offset, source, n * sizeof(float));
  } else if (dtype == DType::kBFloat16) {
    uint16_t* t = static_cast<uint16_t*>(target) + offset;
    for (int64_t i = 0; i < n; ++i) t[i] = float_to_bfloat16(source[i]);
  } else {
    uint16_t* t = static_cast<uint16_t*>(target) + offset;
    for (int64_t i = 0; i < n; ++i) t[i] = float_to_float16(source[i]);
  }
}

inline void store(void* target, DType, int64_t offset, const double* source, int64_t n) {
  std::memcpy(static_cast<double*>(target) + offset, source, n * sizeof(double));
}

}  // namespace based::cpu::BASED_ISA
