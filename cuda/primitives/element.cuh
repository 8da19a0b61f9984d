// Element types on the device: everything is computed in float and rounded once when stored.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace based::cuda {

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

}  // namespace based::cuda
