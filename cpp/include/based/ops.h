// The ops. Each checks its arguments, writes its outputs and returns a Status that names op,
// argument, expected and got. Outputs may be uninitialised; they must not overlap inputs.
#pragma once

#include "based/params.h"

namespace based::cpu {

Status taylor_feature_map(const TaylorFeatureMapParams&, ParallelFor = {});
Status taylor_feature_map_backward(const TaylorFeatureMapBackwardParams&, ParallelFor = {});
Status linear_attention(const LinearAttentionParams&, ParallelFor = {});
Status linear_attention_backward(const LinearAttentionBackwardParams&, ParallelFor = {});
Status linear_attention_decode(const LinearAttentionDecodeParams&, ParallelFor = {});
Status linear_attention_decode_deferred(const LinearAttentionDecodeDeferredParams&,
                                        ParallelFor = {});
Status linear_attention_fold(const LinearAttentionFoldParams&, ParallelFor = {});
Status sliding_window_attention(const SlidingWindowParams&, ParallelFor = {});
Status sliding_window_attention_backward(const SlidingWindowBackwardParams&, ParallelFor = {});
Status sliding_window_decode(const SlidingWindowDecodeParams&, ParallelFor = {});
Status short_conv(const ShortConvParams&, ParallelFor = {});
Status short_conv_backward(const ShortConvBackwardParams&, ParallelFor = {});
Status short_conv_decode(const ShortConvDecodeParams&, ParallelFor = {});

// Instruction set the CPU kernels run with: "generic", "avx2" or "avx512". The best one this
// machine has, or the one named by the environment variable BASED_CPU_ISA.
const char* instruction_set();

}  // namespace based::cpu

namespace based::cuda {

using Stream = void*;  // a cudaStream_t of the device that the tensors live on

// Device memory an op may scribble on during its call: so many bytes, aligned to 256. An op without
// such a function takes a null workspace.
Status taylor_feature_map(const TaylorFeatureMapParams&, void* workspace, Stream);
Status taylor_feature_map_backward(const TaylorFeatureMapBackwardParams&, void* workspace, Stream);
Status linear_attention(const LinearAttentionParams&, void* workspace, Stream);
int64_t linear_attention_workspace_size(const LinearAttentionParams&);
Status linear_attention_backward(const LinearAttentionBackwardParams&, void* workspace, Stream);
int64_t linear_attention_backward_workspace_size(const LinearAttentionBackwardParams&);
Status linear_attention_decode(const LinearAttentionDecodeParams&, void* workspace, Stream);
Status linear_attention_decode_deferred(const LinearAttentionDecodeDeferredParams&, void* workspace,
                                        Stream);
Status linear_attention_fold(const LinearAttentionFoldParams&, void* workspace, Stream);
Status sliding_window_attention(const SlidingWindowParams&, void* workspace, Stream);
Status sliding_window_attention_backward(const SlidingWindowBackwardParams&, void* workspace,
                                         Stream);
int64_t sliding_window_attention_backward_workspace_size(const SlidingWindowBackwardParams&);
Status sliding_window_decode(const SlidingWindowDecodeParams&, void* workspace, Stream);
Status short_conv(const ShortConvParams&, void* workspace, Stream);
int64_t short_conv_backward_workspace_size(const ShortConvBackwardParams&);
Status short_conv_backward(const ShortConvBackwardParams&, void* workspace, Stream);
Status short_conv_decode(const ShortConvDecodeParams&, void* workspace, Stream);
Status skinny_linear(const SkinnyLinearParams&, void* workspace, Stream);
int64_t decode_block_workspace_size(const DecodeBlockParams&);
Status decode_block(const DecodeBlockParams&, void* workspace, Stream);

}  // namespace based::cuda
