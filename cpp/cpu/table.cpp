// The table of one instruction set, and the declarations of its kernels.
#include "kernels.h"

#define BASED_STRING_(x) #x
#define BASED_STRING(x) BASED_STRING_(x)

namespace based::cpu::BASED_ISA {

bool taylor_feature_map(const TaylorFeatureMapParams&, ParallelFor);
bool taylor_feature_map_backward(const TaylorFeatureMapBackwardParams&, ParallelFor);
bool linear_attention(const LinearAttentionParams&, ParallelFor);
bool linear_attention_backward(const LinearAttentionBackwardParams&, ParallelFor);
bool linear_attention_decode(const LinearAttentionDecodeParams&, ParallelFor);
bool linear_attention_decode_deferred(const LinearAttentionDecodeDeferredParams&, ParallelFor);
bool linear_attention_fold(const LinearAttentionFoldParams&, ParallelFor);
bool sliding_window_attention(const SlidingWindowParams&, ParallelFor);
bool sliding_window_attention_backward(const SlidingWindowBackwardParams&, ParallelFor);
bool sliding_window_decode(const SlidingWindowDecodeParams&, ParallelFor);
bool short_conv(const ShortConvParams&, ParallelFor);
bool short_conv_backward(const ShortConvBackwardParams&, ParallelFor);
bool short_conv_decode(const ShortConvDecodeParams&, ParallelFor);

extern const Kernels kKernels = {BASED_STRING(BASED_ISA),
                                 taylor_feature_map,
                                 taylor_feature_map_backward,
                                 linear_attention,
                                 linear_attention_backward,
                                 linear_attention_decode,
                                 linear_attention_decode_deferred,
                                 linear_attention_fold,
                                 sliding_window_attention,
                                 sliding_window_attention_backward,
                                 sliding_window_decode,
                                 short_conv,
                                 short_conv_backward,
                                 short_conv_decode};

}  // namespace based::cpu::BASED_ISA
