// The argument checks of every op, shared by both backends.
#pragma once

#include <array>

#include "based/params.h"

namespace based {

// Ranks, shapes, dtypes, devices, strides and scalars. Reads no tensor data.
Status validate(const TaylorFeatureMapParams&);
Status validate(const TaylorFeatureMapBackwardParams&);
Status validate(const LinearAttentionParams&);
Status validate(const LinearAttentionBackwardParams&);
Status validate(const LinearAttentionDecodeParams&);
Status validate(const LinearAttentionDecodeDeferredParams&);
Status validate(const LinearAttentionFoldParams&);
Status validate(const SlidingWindowParams&);
Status validate(const SlidingWindowBackwardParams&);
Status validate(const SlidingWindowDecodeParams&);
Status validate(const ShortConvParams&);
Status validate(const ShortConvBackwardParams&);
Status validate(const ShortConvDecodeParams&);
Status validate(const SkinnyLinearParams&);
Status validate(const DecodeBlockParams&);

// The values of the index tensors of validated params. Reads them, so they must lie in host memory:
// the GPU's caller puts copies into the params first. They are the tensors index_tensors() lists.
Status validate_indices(const TaylorFeatureMapParams&);
Status validate_indices(const LinearAttentionParams&);
Status validate_indices(const LinearAttentionBackwardParams&);
Status validate_indices(const LinearAttentionDecodeParams&);
Status validate_indices(const LinearAttentionDecodeDeferredParams&);
Status validate_indices(const LinearAttentionFoldParams&);
Status validate_indices(const SlidingWindowParams&);
Status validate_indices(const SlidingWindowBackwardParams&);
Status validate_indices(const SlidingWindowDecodeParams&);
Status validate_indices(const ShortConvParams&);
Status validate_indices(const ShortConvBackwardParams&);
Status validate_indices(const ShortConvDecodeParams&);
Status validate_indices(const SkinnyLinearParams&);
Status validate_indices(const DecodeBlockParams&);

constexpr int kMaxIndexTensors = 2;
using IndexTensors = std::array<TensorView*, kMaxIndexTensors>;  // null past the last one
inline IndexTensors index_tensors(TaylorFeatureMapParams&) { return {}; }
inline IndexTensors index_tensors(LinearAttentionParams& p) { return {&p.cu_seqlens}; }
inline IndexTensors index_tensors(LinearAttentionDecodeParams& p) { return {&p.state_indices}; }
inline IndexTensors index_tensors(LinearAttentionDecodeDeferredParams& p) {
  return {&p.state_indices, &p.fill};
}
inline IndexTensors index_tensors(LinearAttentionFoldParams& p) {
  return {&p.state_indices, &p.fill};
}
inline IndexTensors index_tensors(SlidingWindowParams& p) {
  return {&p.cu_seqlens, &p.initial_positions};
}
inline IndexTensors index_tensors(SlidingWindowDecodeParams& p) {
  return {&p.state_indices, &p.positions};
}
inline IndexTensors index_tensors(ShortConvParams& p) { return {&p.cu_seqlens}; }
inline IndexTensors index_tensors(ShortConvDecodeParams& p) { return {&p.state_indices}; }
inline IndexTensors index_tensors(SkinnyLinearParams&) { return {}; }
inline IndexTensors index_tensors(DecodeBlockParams& p) { return {&p.state_indices}; }

// A Status with a printf-style message "<op>: <argument>: expected ..., got ...".
Status make_status(StatusCode code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Element i of an int32 or int64 vector in host memory.
inline int64_t load_index(const TensorView& view, int64_t i) {
  const int64_t offset = i * view.stride[0];
  return view.dtype == DType::kInt32 ? static_cast<const int32_t*>(view.data)[offset]
                                     : static_cast<const int64_t*>(view.data)[offset];
}

}  // namespace based
