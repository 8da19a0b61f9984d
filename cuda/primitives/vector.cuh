// kVec neighbouring elements as one access. They stay packed in registers; read one by one they are
// floats.
#pragma once

#include <cstdint>
#include <type_traits>

#include "based/types.h"
#include "primitives/element.cuh"

namespace based::cuda {

template <class Element, int kVec>
struct alignas(sizeof(Element) * kVec) Vector {
  // 32-bit registers, where there are several elements or wide ones.
  using Word = std::conditional_t<sizeof(Element) * kVec % 4 == 0, uint32_t, Element>;
  Word words[sizeof(Element) * kVec / sizeof(Word)];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(Element) == 4) return __uint_as_float(words[i]);
    if constexpr (kVec == 1) return to_float(words[0]);
    const uint32_t word = words[i / 2];
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
      return __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      return __half2float(__ushort_as_half(static_cast<uint16_t>(word >> 16 * (i % 2))));
    }
  }
};

// At an address aligned to the vector's size.
template <int kVec, class Element>
__device__ __forceinline__ Vector<Element, kVec> load_vector(const Element* from) {
  return *reinterpret_cast<const Vector<Element, kVec>*>(from);
}

// Rounds once.
template <class Element, int kVec>
__device__ __forceinline__ void store_vector(Element* to, const float (&from)[kVec]) {
  if constexpr (kVec == 1) {
    *to = from_float<Element>(from[0]);
  } else {
    Vector<Element, kVec> vector;
#pragma unroll
    for (int i = 0; i < kVec; i += 4 / sizeof(Element)) {
      uint32_t& word = vector.words[i * sizeof(Element) / 4];
      if constexpr (sizeof(Element) == 4) {
        word = __float_as_uint(from[i]);
      } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(from[i], from[i + 1]);
        word = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(from[i], from[i + 1]);
        word = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
    *reinterpret_cast<Vector<Element, kVec>*>(to) = vector;
  }
}

// Whether the rows of a tensor start at whole vectors of `count` elements of so many bytes.
inline bool rows_are_vectors(const TensorView& view, int count, int element_bytes) {
  if (view.rank < 0) return true;
  if (reinterpret_cast<uintptr_t>(view.data) % (count * element_bytes) != 0) return false;
  if (view.rank > 0 && view.size[view.rank - 1] % count != 0) return false;
  for (int i = 0; i + 1 < view.rank; ++i) {
    if (view.size[i] > 1 && view.stride[i] % count != 0) return false;
  }
  return true;
}

}  // namespace based::cuda
