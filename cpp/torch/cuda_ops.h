// The ops that have CUDA kernels in this build.
#pragma once

#include <array>

#include "tensor.h"

namespace based::binding {

#if defined(BASED_HAS_CUDA)
inline constexpr std::array<const char*, 2> kCudaOps = {
    "taylor_feature_map",
    "taylor_feature_map_backward",
};
template <>
inline constexpr CudaOp<TaylorFeatureMapParams> kCudaOp<TaylorFeatureMapParams> = {
    cuda::taylor_feature_map};
template <>
inline constexpr CudaOp<TaylorFeatureMapBackwardParams> kCudaOp<TaylorFeatureMapBackwardParams> = {
    cuda::taylor_feature_map_backward};
#else
inline constexpr std::array<const char*, 0> kCudaOps = {};
#endif

}  // namespace based::binding
