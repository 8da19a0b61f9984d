// Runtime values -> compile-time ones, and the Status of a launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "validate.h"

namespace based::cuda {

template <class T>
struct Type {
  using type = T;
};

// fn(Type<Element>{}) for the element type of a tensor; a Status of its own for any other.
template <class Fn>
Status dispatch_element(const char* op, DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(Type<float>{});
    case DType::kBFloat16:
      return fn(Type<__nv_bfloat16>{});
    case DType::kFloat16:
      return fn(Type<__half>{});
    default:
      return make_status(StatusCode::kUnsupported,
                         "%s: dtype: expected float32, bfloat16 or float16 on CUDA, got another",
                         op);
  }
}

inline Status launch_status(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  if (error == cudaErrorNoKernelImageForDevice) {
    return make_status(StatusCode::kUnsupported,
                       "%s: device: expected a GPU of compute capability 8.0 or newer, got an "
                       "older one",
                       op);
  }
  return make_status(StatusCode::kCudaError, "%s: launch: expected success, got CUDA error: %s", op,
                     cudaGetErrorString(error));
}

}  // namespace based::cuda
