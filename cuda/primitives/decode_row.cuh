// What a decode kernel does with a row of its batch. Nobody has checked state_indices on the
// device.
#pragma once

#include "primitives/packed.cuh"

namespace based::cuda {

enum class RowKind { kRun, kSkip, kBad };

// The slot of row b in a pool of `slots` states. -1 skips the row: its output is 0. Any other
// number outside the pool is bad: its output is NaN. Neither touches a state.
struct DecodeRow {
  RowKind kind;
  int64_t slot;
};

__device__ __forceinline__ DecodeRow decode_row(const IndexVector& state_indices, int64_t b,
                                                int64_t slots) {
  const int64_t slot = state_indices.data == nullptr ? b : state_indices[b];
  if (slot == -1) return {RowKind::kSkip, slot};
  return {slot >= 0 && slot < slots ? RowKind::kRun : RowKind::kBad, slot};
}

// What the whole output of a row becomes that is not run.
__device__ __forceinline__ float filler(RowKind kind) {
  return kind == RowKind::kSkip ? 0.0f : __int_as_float(0x7fffffff);
}

}  // namespace based::cuda
