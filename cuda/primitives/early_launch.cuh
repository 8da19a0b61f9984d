// Programmatic dependent launch: a kernel that is launched so may start while the one before it in
// the stream still runs, and waits for that one where it first needs it.
#pragma once

namespace based::cuda {

// Such a kernel behind this one may start from here on; to others it makes no difference.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace based::cuda
