// Independent tasks over threads, and the sequences a (B, T, H, .) tensor is made of.
#pragma once

#include <stdlib.h>

#include <cstdint>

#include "based/types.h"
#include "validate.h"

namespace based::cpu::BASED_ISA {

// body(task, scratch) for every task in [0, count); scratch holds `elements` uninitialised values
// of T, 64-byte aligned, its own in every thread. False when there is no memory for it.
template <class T, class BodyFn>
bool for_each_task(ParallelFor parallel, int64_t count, int64_t elements, const BodyFn& body) {
  struct Shared {
    const BodyFn& body;
    int64_t bytes;
    bool failed;
  } shared = {body, (elements * static_cast<int64_t>(sizeof(T)) + 64) / 64 * 64, false};
  const auto run_range = [](void* argument, int64_t begin, int64_t end) {
    Shared& s = *static_cast<Shared*>(argument);
    T* scratch = static_cast<T*>(aligned_alloc(64, s.bytes));
    if (scratch == nullptr) {
      __atomic_store_n(&s.failed, true, __ATOMIC_RELAXED);
      return;
    }
    for (int64_t task = begin; task < end; ++task) s.body(task, scratch);
    free(scratch);
  };
  if (count > 0) parallel.run(parallel.context, count, run_range, &shared);
  return !shared.failed;
}

// Tokens [begin, end) of batch row `batch`: sequence n of a padded or packed batch.
struct Sequence {
  int64_t batch, begin, end;
};

inline int64_t sequence_count(const TensorView& cu_seqlens, int64_t batch) {
  return cu_seqlens.rank < 0 ? batch : cu_seqlens.size[0] - 1;
}

inline Sequence sequence(const TensorView& cu_seqlens, int64_t n, int64_t seqlen) {
  if (cu_seqlens.rank < 0) return {n, 0, seqlen};
  return {0, load_index(cu_seqlens, n), load_index(cu_seqlens, n + 1)};
}

// The slot of row b, or -1 to skip it.
inline int64_t slot_of(const TensorView& state_indices, int64_t b) {
  return state_indices.rank < 0 ? b : load_index(state_indices, b);
}

}  // namespace based::cpu::BASED_ISA
