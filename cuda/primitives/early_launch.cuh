// Programmatic dependent launch: a kernel that is launched so may start while the one before it in
// the stream still runs, and waits for that one where it first needs it.
#pragma once

#include <cuda_runtime.h>

namespace based::cuda {

// Such a kernel behind this one may start from here on; to others it makes no difference.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// All work of the kernels before is done from here on, and seen. A kernel of launch_early() touches
// no global memory before.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where the GPU can, the kernel may start early. Errors are left to cudaGetLastError().
template <class Parameter>
void launch_early(void (*kernel)(Parameter), unsigned blocks, unsigned threads, int shared_bytes,
                  cudaStream_t stream, const Parameter& argument) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = major >= 9 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, argument);
}

}  // namespace based::cuda
