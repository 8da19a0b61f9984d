// Bulk copies from global to shared memory (Hopper's copy engine), and the barrier they complete
// on. On older architectures nothing here may be called.
#pragma once

#include <cstdint>

namespace based::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasBulkCopy = false;
#else
constexpr bool kHasBulkCopy = true;
#endif

// By one thread: `bytes` (a multiple of 16) between 16-byte aligned addresses. They arrive on the
// mbarrier at that address in shared memory, which expects them. kOnce: nobody reads them again
// soon, so they are the first to leave L2.
template <bool kOnce = false>
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes,
                                           uint32_t barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kOnce) {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;\n" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;\n" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
    return;
  }
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
#endif
}

// One phase after the other: each ends when the bytes that were announced have arrived.
struct CopyBarrier {
  uint64_t state;  // in shared memory

  __device__ __forceinline__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state));
  }

  // By one thread; other threads may wait after the next block barrier.
  __device__ __forceinline__ void init() {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;\n" ::"r"(address()) : "memory");
  }

  // By that thread: `bytes` (a multiple of 16) between 16-byte aligned addresses.
  template <bool kOnce = false>
  __device__ __forceinline__ void copy(void* shared, const void* global, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n" ::"r"(address()), "r"(bytes)
                 : "memory");
#endif
    copy_bytes<kOnce>(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), global, bytes,
                      address());
  }

  // Until the phase of this parity (0, 1, 0, ...) has ended.
  __device__ __forceinline__ void wait(int parity) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    uint32_t done = 0;
    while (done == 0) {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}\n"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
    }
#endif
  }
};

// This thread's ordinary accesses to shared memory come before the bulk copies that a thread issues
// after the next block barrier.
__device__ __forceinline__ void fence_proxy_async() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// After init(), before copy(), by the thread that calls both.
__device__ __forceinline__ void fence_barrier_init() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
#endif
}

}  // namespace based::cuda
