// Which sequence a token belongs to. cu_seqlens stays on the device and may hold anything: every
// bound returned lies in [0, T].
#pragma once

#include <cstdint>

#include "based/types.h"

namespace based::cuda {

// A vector of int32 or int64 on the device; no data when it is not given.
struct IndexVector {
  const void* data;
  int64_t stride;
  int64_t size;
  bool is_int32;

  // An element on its way: value() is the first to wait for it.
  struct Words {
    int32_t low, high;
  };
  __device__ __forceinline__ Words load(int64_t i) const {
    const int32_t* words = static_cast<const int32_t*>(data) + (is_int32 ? 1 : 2) * i * stride;
    return {words[0], is_int32 ? 0 : words[1]};
  }
  __device__ __forceinline__ int64_t value(Words x) const {
    const uint64_t whole = uint64_t(uint32_t(x.high)) << 32 | uint32_t(x.low);
    return is_int32 ? x.low : static_cast<int64_t>(whole);
  }

  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return is_int32 ? static_cast<const int32_t*>(data)[i * stride]
                    : static_cast<const int64_t*>(data)[i * stride];
  }
};

inline IndexVector index_vector(const TensorView& view) {
  if (view.rank < 0) return {nullptr, 0, 0, false};
  return {view.data, view.stride[0], view.size[0], view.dtype == DType::kInt32};
}

// Tokens [begin, end) of sequence n; n < 0 stands for tokens of no sequence.
struct Span {
  int64_t n, begin, end;
};

// The sequence that holds token t: the n with bounds[n] <= t < bounds[n+1]. Where there is none,
// because the first bound is not 0 or the last not T, the token stands alone with n = -1.
__device__ __forceinline__ Span sequence_at(const IndexVector& bounds, int64_t t, int64_t T) {
  int64_t low = -1, high = bounds.size;  // bounds[low] <= t < bounds[high], as far as they exist
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (bounds[middle] <= t ? low : high) = middle;
  }
  if (low < 0 || high == bounds.size) return {-1, t, t + 1};
  const int64_t begin = bounds[low], end = bounds[high];
  return {low, begin > 0 ? begin : 0, end < T ? end : T};
}

// Sequence n; n = -1 when its bounds are not in order.
__device__ __forceinline__ Span sequence(const IndexVector& bounds, int64_t n, int64_t T) {
  const int64_t begin = bounds[n], end = bounds[n + 1];
  if (begin < 0 || end < begin || end > T) return {-1, 0, 0};
  return {n, begin, end};
}

}  // namespace based::cuda
