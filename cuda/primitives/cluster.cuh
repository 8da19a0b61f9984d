// Clusters of CTAs that read each other's shared memory; sm_90 and up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "primitives/mbarrier.cuh"

namespace based::cuda {

// All threads of the cluster meet here; shared memory written before is seen after.
__device__ __forceinline__ void cluster_barrier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
#endif
}

// The same in two parts for nothing but barriers that were made before (fence_barrier_init()): a
// release would wait until all earlier writes are seen by the whole GPU.
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
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

// Sends x to where `address` (a multiple of 16) is in the CTA of that rank; its bytes arrive on the
// `barrier` there, which expects them (Mbarrier::expect). Needs no fence.
__device__ __forceinline__ void send(uint32_t address, const Mbarrier& barrier, int rank,
                                     float4 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 to, there; mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3,%4,%5,%6}, "
      "[there];}\n" ::"r"(address),
      "r"(shared_address(&barrier)), "r"(rank), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
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
