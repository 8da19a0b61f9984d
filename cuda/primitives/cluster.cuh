// Clusters of CTAs that read each other's shared memory; sm_90 and up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "primitives/mbarrier.cuh"

namespace based::cuda {

// All threads of the cluster meet: what they wrote to shared memory before they arrive is seen by
// those that have waited.
__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}

// Four floats at the address that `address` (a multiple of 16) is in the CTA of that rank.
__device__ __forceinline__ float4 load_remote(uint32_t address, int rank) {
  float4 x{};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [remote];}\n"
      : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return x;
}

// Arrives `count` times on the barrier that lies where `barrier` does in the CTA of that rank.
__device__ __forceinline__ void arrive_remote(const Mbarrier& barrier, int rank, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote], %2;}\n" ::"r"(
          shared_address(&barrier)),
      "r"(rank), "r"(count)
      : "memory");
#endif
}

// Mbarrier::wait() where others of the cluster arrive.
__device__ __forceinline__ void wait_for_cluster(const Mbarrier& barrier, int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}\n"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  }
#endif
}

// Clusters of `ctas` CTAs each; the kernel may start early (early_launch.cuh). `cooperative`: only
// when all of them can run at the same time. Errors are left to cudaGetLastError().
template <class... Parameters>
void launch_clusters(void (*kernel)(Parameters...), int clusters, int ctas, int threads,
                     int shared_bytes, bool cooperative, cudaStream_t stream,
                     const Parameters&... arguments) {
  cudaLaunchAttribute attributes[3] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {unsigned(ctas), 1, 1};
  attributes[2].id = cudaLaunchAttributeCooperative;
  attributes[2].val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(clusters * ctas), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attributes, config.numAttrs = cooperative ? 3 : 2;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace based::cuda
