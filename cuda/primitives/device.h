// What the current device can do, for launchers.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <utility>

namespace based::cuda {

// Whether the GPU runs the code for sm_90a, if this build has any.
inline bool runs_wgmma() {
#ifdef BASED_CUDA_SM90A
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

// Whether the current device gives a kernel's blocks so much dynamic shared memory. More than 48 KB
// has to be asked for; that takes a tenth of a launch's time, so a thread asks once.
inline bool allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return true;
  thread_local std::map<std::pair<const void*, int>, size_t> allowed;  // of a kernel on a device
  int device = 0;
  cudaGetDevice(&device);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return true;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(bytes)) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  most = bytes;
  return true;
}

}  // namespace based::cuda
