// Barriers in shared memory (sm_80 and up) that asynchronous copies can arrive on. A barrier's
// phase ends when as many threads as it was made for have arrived; phases count 0, 1, 0, ...
#pragma once

#include <cstdint>

#include "primitives/core_tile.cuh"

namespace based::cuda {

struct Mbarrier {
  uint64_t state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(this)), "r"(arrivals)
                 : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile(
        "{.reg .b64 token; mbarrier.arrive.shared.b64 token, [%0];}\n" ::"r"(shared_address(this))
        : "memory");
  }

  // Arrives; the phase ends only when so many bytes of copies have arrived too (sm_90 and up).
  __device__ __forceinline__ void expect(uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n" ::"r"(shared_address(this)),
                 "r"(bytes)
                 : "memory");
#endif
  }

  // Arrives once all cp.async that this thread has started are done.
  __device__ __forceinline__ void arrive_after_copies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];\n" ::"r"(shared_address(this))
                 : "memory");
  }

  // Waits for the end of the phase of this parity.
  __device__ __forceinline__ void wait(int parity) {
    uint32_t done = 0;
    while (done == 0) {
#if __CUDA_ARCH__ >= 900
      asm volatile(
          "{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;}\n"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
#else
      asm volatile(
          "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;}\n"
          : "=r"(done)
          : "r"(shared_address(this)), "r"(parity)
          : "memory");
#endif
    }
  }
};

}  // namespace based::cuda
