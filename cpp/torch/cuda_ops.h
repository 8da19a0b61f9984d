// The ops that have CUDA kernels in this build. A null function is an op that has none.
#pragma once

#include <array>

#include "based/ops.h"

namespace based::binding {

#if defined(BASED_HAS_CUDA)
inline constexpr std::array<const char*, 2> kCudaOps = {"taylor_feature_map",
                                                        "taylor_feature_map_backward"};
inline constexpr auto kCudaTaylorFeatureMap = &cuda::taylor_feature_map;
inline constexpr auto kCudaTaylorFeatureMapBackward = &cuda::taylor_feature_map_backward;
#else
inline constexpr std::array<const char*, 0> kCudaOps = {};
inline constexpr Status (*kCudaTaylorFeatureMap)(const TaylorFeatureMapParams&,
                                                 cuda::Stream) = nullptr;
inline constexpr Status (*kCudaTaylorFeatureMapBackward)(const TaylorFeatureMapBackwardParams&,
                                                         cuda::Stream) = nullptr;
#endif

}  // namespace based::binding
