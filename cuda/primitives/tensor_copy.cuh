// Copies of boxes of a matrix (tensor_map.h) by the copy engine; sm_90 and up. One thread asks for
// a box and goes on: its bytes arrive on an Mbarrier.
#pragma once

#include <cuda.h>

#include "primitives/mbarrier.cuh"

namespace based::cuda {

// How long a copied line stays in L2: an opaque number of the instruction set.
enum class Keep : uint64_t {
  kShort = 0x12F0000000000000,  // read once: the first to go
  kLong = 0x14F0000000000000,   // read by many: the last to go
};

// tile <- the box at (row, column). The barrier expects its bytes (Mbarrier::expect).
__device__ __forceinline__ void copy_box(uint32_t tile, const CUtensorMap& matrix, int row,
                                         int column, const Mbarrier& barrier, Keep keep) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;\n" ::"r"(tile),
      "l"(&matrix), "r"(column), "r"(row), "r"(shared_address(&barrier)), "l"(uint64_t(keep))
      : "memory");
#endif
}

// The same of make_paired_tensor_map(): eight rows of the first half, eight of the second, the next
// eight of the first, ..., from the pair of that number on.
__device__ __forceinline__ void copy_paired_box(uint32_t tile, const CUtensorMap& matrix, int pair,
                                                int column, const Mbarrier& barrier, Keep keep) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %5, %5, %3}], [%4], %6;\n" ::"r"(tile),
      "l"(&matrix), "r"(column), "r"(pair), "r"(shared_address(&barrier)), "r"(0),
      "l"(uint64_t(keep))
      : "memory");
#endif
}

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& matrix) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&matrix) : "memory");
#endif
}

}  // namespace based::cuda
