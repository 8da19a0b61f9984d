// The CPU kernels, one table per instruction set. A kernel trusts its validated arguments, needs
// parallel.run to be set, and returns false when there is no memory for its scratch.
#pragma once

#include "based/params.h"

namespace based::cpu {

struct Kernels {
  const char* name;
  bool (*taylor_feature_map)(const TaylorFeatureMapParams&, ParallelFor);
  bool (*taylor_feature_map_backward)(const TaylorFeatureMapBackwardParams&, ParallelFor);
  bool (*linear_attention)(const LinearAttentionParams&, ParallelFor);
  bool (*linear_attention_backward)(const LinearAttentionBackwardParams&, ParallelFor);
  bool (*linear_attention_decode)(const LinearAttentionDecodeParams&, ParallelFor);
  bool (*linear_attention_decode_deferred)(const LinearAttentionDecodeDeferredParams&, ParallelFor);
  bool (*linear_attention_fold)(const LinearAttentionFoldParams&, ParallelFor);
  bool (*sliding_window_attention)(const SlidingWindowParams&, ParallelFor);
  bool (*sliding_window_attention_backward)(const SlidingWindowBackwardParams&, ParallelFor);
  bool (*sliding_window_decode)(const SlidingWindowDecodeParams&, ParallelFor);
  bool (*short_conv)(const ShortConvParams&, ParallelFor);
  bool (*short_conv_backward)(const ShortConvBackwardParams&, ParallelFor);
  bool (*short_conv_decode)(const ShortConvDecodeParams&, ParallelFor);
};

namespace generic {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace based::cpu
