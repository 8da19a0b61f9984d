// Tensor maps: what the copy engine (Hopper's TMA) has to know about a matrix in global memory in
// order to copy boxes of it into shared memory (tensor_copy.cuh). A kernel takes one by value, as a
// __grid_constant__ parameter. The driver makes them; it is found through the runtime, so nothing
// links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "based/types.h"

namespace based::cuda {

// Of boxes of `box_rows` rows of 64 columns of a matrix (rows, columns) of 16-bit elements, for the
// 128-byte swizzle (wgmma.cuh). What lies outside the matrix reads as 0. The matrix starts at a
// multiple of 16 bytes, and so does every row; rows do not overlap.
inline cudaError_t make_tensor_map(CUtensorMap* map, const TensorView& matrix, int box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<Encode>(found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto type = matrix.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t size[] = {cuuint64_t(matrix.size[1]), cuuint64_t(matrix.size[0])};
  const int64_t stride = matrix.size[0] > 1 ? matrix.stride[0] : (matrix.size[1] + 7) / 8 * 8;
  const cuuint64_t row_bytes[] = {2 * cuuint64_t(stride)};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, step[] = {1, 1};
  const CUresult result =
      encode(map, type, 2, matrix.data, size, row_bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace based::cuda
