// kVec neighbouring elements kept as the 32-bit words they were loaded as, so that 16-bit elements
// do not take a register each until they are used.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "primitives/element.cuh"

namespace based::cuda {

template <class Element, int kVec>
struct alignas(sizeof(Element) * kVec) PackedVector {
  static_assert(sizeof(Element) * kVec % 4 == 0, "whole words");
  uint32_t words[sizeof(Element) * kVec / 4];

  __device__ __forceinline__ void to_floats(float* target) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if constexpr (sizeof(Element) == 4) {
        target[i] = __uint_as_float(words[i]);
      } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        target[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
      } else {
        __half2 pair;
        memcpy(&pair, &words[i / 2], sizeof pair);
        target[i] = i % 2 == 0 ? __low2float(pair) : __high2float(pair);
      }
    }
  }
  __device__ __forceinline__ void from_floats(const float* source) {
    Element elements[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) elements[i] = from_float<Element>(source[i]);
    memcpy(words, elements, sizeof words);
  }
};

// A single 16-bit element is no word.
template <class Element>
struct PackedElement {
  Element element;

  __device__ __forceinline__ void to_floats(float* target) const { *target = to_float(element); }
  __device__ __forceinline__ void from_floats(const float* source) {
    element = from_float<Element>(*source);
  }
};

template <class Element, int kVec>
using Packed = std::conditional_t<kVec == 1, PackedElement<Element>, PackedVector<Element, kVec>>;

}  // namespace based::cuda
