// The argument checks of every op, shared by both backends.
#pragma once

#include "based/params.h"

namespace based {

// Ranks, shapes, dtypes, devices, strides and scalars. Reads no tensor data.
Status validate(const TaylorFeatureMapParams&);
Status validate(const TaylorFeatureMapBackwardParams&);
Status validate(const LinearAttentionParams&);
Status validate(const LinearAttentionBackwardParams&);
Status validate(const LinearAttentionDecodeParams&);
Status validate(const SlidingWindowParams&);
Status validate(const SlidingWindowBackwardParams&);
Status validate(const SlidingWindowDecodeParams&);
Status validate(const ShortConvParams&);
Status validate(const ShortConvBackwardParams&);
Status validate(const ShortConvDecodeParams&);

// The values of the index tensors, read from host memory: host_* replaces the params' tensor, so
// that a GPU caller can pass copies. Tensors that are not given are skipped.
Status validate_cu_seqlens(const char* op, const TensorView& host_cu_seqlens, int64_t total);
Status validate_positions(const char* op, const char* argument, const TensorView& host_positions);
Status validate_state_indices(const char* op, const TensorView& host_state_indices, int64_t slots);

// A Status with a printf-style message "<op>: <argument>: expected ..., got ...".
Status make_status(StatusCode code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Element i of an int32 or int64 vector in host memory.
inline int64_t load_index(const TensorView& view, int64_t i) {
  const int64_t offset = i * view.stride[0];
  return view.dtype == DType::kInt32 ? static_cast<const int32_t*>(view.data)[offset]
                                     : static_cast<const int64_t*>(view.data)[offset];
}

}  // namespace based
