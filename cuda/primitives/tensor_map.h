// Tensor maps: what the copy engine (Hopper's TMA) has to know about a matrix in global memory in
// order to copy boxes of it into shared memory (tensor_copy.cuh). A kernel takes one by value, as a
// __grid_constant__ parameter. The driver makes them; it is found through the runtime, so nothing
// links libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "based/types.h"

namespace based::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Null where the driver has none.
inline EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<EncodeTensorMap>(found == cudaDriverEntryPointSuccess ? function
                                                                                  : nullptr);
  }();
  return encode;
}

// Of boxes (outermost size last) of an array of 16-bit elements, for the 128-byte swizzle
// (wgmma.cuh). What lies outside reads as 0.
template <int kRank>
cudaError_t make_tensor_map(CUtensorMap* map, const TensorView& matrix,
                            const cuuint64_t (&size)[kRank],
                            const cuuint64_t (&stride_bytes)[kRank - 1],
                            const cuuint32_t (&box)[kRank]) {
  const EncodeTensorMap encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto type = matrix.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cuuint32_t step[kRank];
  for (cuuint32_t& x : step) x = 1;
  const CUresult result =
      encode(map, type, kRank, matrix.data, size, stride_bytes, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Of boxes of `box_rows` rows of 64 columns of a matrix (rows, columns). The matrix starts at a
// multiple of 16 bytes, and so does every row; rows do not overlap.
inline cudaError_t make_tensor_map(CUtensorMap* map, const TensorView& matrix, int box_rows) {
  const int64_t stride = matrix.size[0] > 1 ? matrix.stride[0] : (matrix.size[1] + 7) / 8 * 8;
  return make_tensor_map<2>(map, matrix, {cuuint64_t(matrix.size[1]), cuuint64_t(matrix.size[0])},
                            {2 * cuuint64_t(stride)}, {64, cuuint32_t(box_rows)});
}

// Of boxes that take eight rows of the upper half of such a matrix and the same eight of the lower
// half in turns; each half has a multiple of eight rows.
inline cudaError_t make_paired_tensor_map(CUtensorMap* map, const TensorView& matrix,
                                          int box_rows) {
  const cuuint64_t half = matrix.size[0] / 2, row_bytes = 2 * cuuint64_t(matrix.stride[0]);
  return make_tensor_map<4>(map, matrix, {cuuint64_t(matrix.size[1]), 8, 2, half / 8},
                            {row_bytes, half * row_bytes, 8 * row_bytes},
                            {64, 8, 2, cuuint32_t(box_rows / 16)});
}

}  // namespace based::cuda
