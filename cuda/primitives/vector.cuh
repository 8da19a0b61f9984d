// kVec neighbouring elements that move in one access, and the host's test that they may.
#pragma once

#include <cstdint>

#include "based/types.h"
#include "primitives/element.cuh"

namespace based::cuda {

template <class Element, int kVec>
struct alignas(sizeof(Element) * kVec) Vector {
  Element values[kVec];
};

template <int kVec, class Element>
__device__ __forceinline__ Vector<Element, kVec> load_vector(const Element* source) {
  return *reinterpret_cast<const Vector<Element, kVec>*>(source);
}

template <class Element, int kVec>
__device__ __forceinline__ void to_floats(float (&floats)[kVec], const Vector<Element, kVec>& v) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) floats[i] = to_float(v.values[i]);
}

template <class Element, int kVec>
__device__ __forceinline__ void store_vector(Element* target, const float (&floats)[kVec]) {
  Vector<Element, kVec> v;
#pragma unroll
  for (int i = 0; i < kVec; ++i) v.values[i] = from_float<Element>(floats[i]);
  *reinterpret_cast<Vector<Element, kVec>*>(target) = v;
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
