// Clusters of CTAs that read each other's shared memory; sm_90 and up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "primitives/mbarrier.cuh"

namespace based::cuda {

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// All threads of the cluster meet here; shared memory written before is seen after.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  cluster_wait();
}

// The first half of a meeting, for nothing but barriers that were made before
// (fence_barrier_init()): a release would wait until all earlier writes are seen by the whole GPU.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
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

// Copies so many bytes (addresses and size: multiples of 16) to where `to` is in the CTA of that
// rank; they arrive on the `barrier` there, which expects them (Mbarrier::expect). Ordinary writes
// of `from` need a fence_proxy_async() before.
__device__ __forceinline__ void copy_to_rank(uint32_t to, uint32_t from, int bytes,
                                             const Mbarrier& barrier, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 there, full; mapa.shared::cluster.u32 there, %0, %4;\n"
      "mapa.shared::cluster.u32 full, %3, %4;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [there], [%1], %2, "
      "[full];}\n" ::"r"(to),
      "r"(from), "r"(bytes), "r"(shared_address(&barrier)), "r"(rank)
      : "memory");
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
