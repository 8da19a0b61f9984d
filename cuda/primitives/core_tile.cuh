// A shared-memory tile of 16-bit elements made of 8 x 8 core matrices (8 rows of 16 bytes,
// contiguous), the form that wgmma reads without a swizzle and ldmatrix without bank conflicts.
// Either dimension can serve as k. Core matrices go down the rows first; a column of them is padded
// by 16 bytes, so that threads that write neighbouring columns of one row hit different banks too.
#pragma once

#include <cstdint>

namespace based::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int kRows_, int kCols_>
struct CoreTile {
  static constexpr int kRows = kRows_, kCols = kCols_;
  static_assert(kRows % 8 == 0 && kCols % 8 == 0);
  static constexpr int kColStride = kRows * 16 + 16;  // bytes from 8 columns to the next 8
  static constexpr int kRowStride = 128;              // bytes from 8 rows to the next 8
  static constexpr int kBytes = kCols / 8 * kColStride;

  char bytes[kBytes];

  // The 16 bytes of columns 8 block ... 8 block + 7 of a row.
  __device__ __forceinline__ char* at(int row, int block) {
    return bytes + block * kColStride + row * 16;
  }
  __device__ __forceinline__ const char* at(int row, int block) const {
    return bytes + block * kColStride + row * 16;
  }
  __device__ __forceinline__ uint32_t address(int row, int block) const {
    return shared_address(bytes) + block * kColStride + row * 16;
  }
};

}  // namespace based::cuda
