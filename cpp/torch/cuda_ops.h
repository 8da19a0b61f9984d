// The ops that have CUDA kernels in this build.
#pragma once

#include <array>

#include "tensor.h"

namespace based::binding {

#if defined(BASED_HAS_CUDA)
inline constexpr std::array kCudaOps = {
    "short_conv",
    "short_conv_backward",
    "short_conv_decode",
    "taylor_feature_map",
    "taylor_feature_map_backward",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_decode",
    "linear_attention_decode_deferred",
    "linear_attention_fold",
    "sliding_window_decode",
    "sliding_window_attention",
    "sliding_window_attention_backward",
    "skinny_linear",
    "decode_block",
    "decode_blocks",
};
template <>
inline constexpr CudaOp<TaylorFeatureMapParams> kCudaOp<TaylorFeatureMapParams> = {
    cuda::taylor_feature_map};
template <>
inline constexpr CudaOp<TaylorFeatureMapBackwardParams> kCudaOp<TaylorFeatureMapBackwardParams> = {
    cuda::taylor_feature_map_backward};
template <>
inline constexpr CudaOp<LinearAttentionParams> kCudaOp<LinearAttentionParams> = {
    cuda::linear_attention, cuda::linear_attention_workspace_size};
template <>
inline constexpr CudaOp<LinearAttentionBackwardParams> kCudaOp<LinearAttentionBackwardParams> = {
    cuda::linear_attention_backward, cuda::linear_attention_backward_workspace_size};
template <>
inline constexpr CudaOp<LinearAttentionDecodeParams> kCudaOp<LinearAttentionDecodeParams> = {
    cuda::linear_attention_decode};
template <>
inline constexpr CudaOp<LinearAttentionDecodeDeferredParams>
    kCudaOp<LinearAttentionDecodeDeferredParams> = {cuda::linear_attention_decode_deferred};
template <>
inline constexpr CudaOp<LinearAttentionFoldParams> kCudaOp<LinearAttentionFoldParams> = {
    cuda::linear_attention_fold};
template <>
inline constexpr CudaOp<SlidingWindowParams> kCudaOp<SlidingWindowParams> = {
    cuda::sliding_window_attention};
template <>
inline constexpr CudaOp<SlidingWindowBackwardParams> kCudaOp<SlidingWindowBackwardParams> = {
    cuda::sliding_window_attention_backward,
    cuda::sliding_window_attention_backward_workspace_size};
template <>
inline constexpr CudaOp<SlidingWindowDecodeParams> kCudaOp<SlidingWindowDecodeParams> = {
    cuda::sliding_window_decode};
template <>
inline constexpr CudaOp<ShortConvParams> kCudaOp<ShortConvParams> = {cuda::short_conv};
template <>
inline constexpr CudaOp<ShortConvBackwardParams> kCudaOp<ShortConvBackwardParams> = {
    cuda::short_conv_backward, cuda::short_conv_backward_workspace_size};
template <>
inline constexpr CudaOp<ShortConvDecodeParams> kCudaOp<ShortConvDecodeParams> = {
    cuda::short_conv_decode};
template <>
inline constexpr CudaOp<SkinnyLinearParams> kCudaOp<SkinnyLinearParams> = {cuda::skinny_linear};
template <>
inline constexpr CudaOp<DecodeBlockParams> kCudaOp<DecodeBlockParams> = {
    cuda::decode_block, cuda::decode_block_workspace_size};
#else
inline constexpr std::array<const char*, 0> kCudaOps = {};
#endif

}  // namespace based::binding
