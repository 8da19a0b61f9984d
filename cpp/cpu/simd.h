// What an instruction set means here. Every kernel file is compiled once per instruction set, with
// BASED_ISA naming the namespace its code lives in; vectors are the compiler's own vector types.
#pragma once

#include <cstdint>
#include <cstring>

namespace based::cpu::BASED_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6, kTileVectors = 4;  // register tile of gemm: 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
constexpr int64_t round_up_lanes(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class T>
inline Vector<T> load_vector(const T* source) {
  Vector<T> v;
  std::memcpy(&v, source, sizeof v);
  return v;
}

template <class T>
inline void store_vector(T* target, Vector<T> v) {
  std::memcpy(target, &v, sizeof v);
}

}  // namespace based::cpu::BASED_ISA
