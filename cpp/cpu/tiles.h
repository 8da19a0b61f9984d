// Tiles in scratch memory: rows of a (B, T, H, .) tensor in the compute type T, and transposes.
#pragma once

#include <cstdint>

#include "element.h"
#include "simd.h"

namespace based::cpu::BASED_ISA {

constexpr int kChunk = 64;  // tokens of a tile

// Hands out parts of one scratch allocation; with a null base it only counts.
template <class T>
struct Arena {
  T* base;
  int64_t used = 0;

  T* take(int64_t elements) {
    T* part = base == nullptr ? nullptr : base + used;
    used += round_up_lanes<T>(elements);
    return part;
  }
};

// Element offset of head h at token t of batch row b.
inline int64_t offset_of(const TensorView& view, int64_t b, int64_t t, int64_t h) {
  return b * view.stride[0] + t * view.stride[1] + h * view.stride[2];
}

// Asks for the row at `offset`, which may be past the end. Rows are a token apart, often a page or
// more: the hardware does not see the next one coming.
inline void prefetch_row(const TensorView& view, int64_t offset, int64_t width) {
  const int64_t bytes = view.dtype == DType::kFloat64 ? 8 : view.dtype == DType::kFloat32 ? 4 : 2;
  const char* row = static_cast<const char*>(view.data) + offset * bytes;
  for (int64_t i = 0; i < width * bytes; i += 64) __builtin_prefetch(row + i);
}

// rows (n, ld) <- factor * view[b, t0 : t0 + n, h]; columns past the width are 0.
template <class T>
void load_rows(T* rows, int64_t ld, const TensorView& view, int64_t b, int64_t t0, int64_t n,
               int64_t h, T factor) {
  constexpr int64_t kAhead = 16;
  const int64_t width = view.size[3];
  for (int64_t t = 0; t < n; ++t) {
    T* row = rows + t * ld;
    prefetch_row(view, offset_of(view, b, t0 + t + kAhead, h), width);
    load(row, view.data, view.dtype, offset_of(view, b, t0 + t, h), width);
    if (factor != T(1)) {
      for (int64_t i = 0; i < width; ++i) row[i] *= factor;
    }
    for (int64_t i = width; i < ld; ++i) row[i] = 0;
  }
}

template <class T>
void store_rows(const TensorView& view, int64_t b, int64_t t0, int64_t n, int64_t h, const T* rows,
                int64_t ld) {
  for (int64_t t = 0; t < n; ++t) {
    store(view.data, view.dtype, offset_of(view, b, t0 + t, h), rows + t * ld, view.size[3]);
  }
}

// columns (width, kChunk) <- the first n rows, transposed; columns past n are 0.
template <class T>
void transpose(T* columns, const T* rows, int64_t ld, int64_t n, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    T* column = columns + i * kChunk;
    for (int64_t t = 0; t < n; ++t) column[t] = rows[t * ld + i];
    for (int64_t t = n; t < kChunk; ++t) column[t] = 0;
  }
}

}  // namespace based::cpu::BASED_ISA
