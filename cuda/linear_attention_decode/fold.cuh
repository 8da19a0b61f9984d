// The conversion of a deferred state to the plain form.
#pragma once

#include "linear_attention_decode/kernels.cuh"

namespace based::cuda {

// S and z take in the tokens that wait in the ring. One block per (row, head), a thread per element
// of S; a conversion, not a step of decoding.
template <class Element>
__global__ void __launch_bounds__(kDecodeMaxThreads)
    linear_attention_fold_kernel(const __grid_constant__ DecodeArgs a) {
  extern __shared__ float sK[];  // (n, D + 1), the last element 1
  const int64_t b = blockIdx.x / unsigned(a.heads), h = blockIdx.x % unsigned(a.heads);
  const DecodeRow row = decode_row(a.state_indices, b, a.slots);
  const int64_t fill = a.fill[b];
  if (row.kind != RowKind::kRun || fill < 0 || fill >= a.capacity) return;
  const int n = static_cast<int>(fill);
  const auto ring = [&](const void* data, const int64_t* stride) {
    return static_cast<const Element*>(data) + row.slot * stride[0] + h * stride[2];
  };
  const Element* gK = ring(a.pending_k, a.pending_k_stride);
  const Element* gV = ring(a.pending_v, a.pending_v_stride);
  for (int i = threadIdx.x; i < n * a.D; i += kDecodeMaxThreads) {
    sK[i + i / a.D] = to_float(gK[i / a.D * a.pending_k_stride[1] + i % a.D]);
  }
  for (int t = threadIdx.x; t < n; t += kDecodeMaxThreads) sK[t * (a.D + 1) + a.D] = 1.0f;
  __syncthreads();
  // Column V of this loop is z, to which every token adds phi(k) times 1.
  float* gS = a.kv_state + row.slot * a.kv_stride[0] + h * a.kv_stride[1];
  float* gZ = a.k_state + row.slot * a.z_stride[0] + h * a.z_stride[1];
  for (int i = threadIdx.x; i < a.F * (a.V + 1); i += kDecodeMaxThreads) {
    const int f = i / (a.V + 1), column = i % (a.V + 1);
    const PhiRow phi(f, a.D, a.root);
    float& target = column == a.V ? gZ[f] : gS[f * a.kv_stride[2] + column];
    float sum = target;
    for (int t = 0; t < n; ++t) {
      const float v = column == a.V ? 1.0f : to_float(gV[t * a.pending_v_stride[1] + column]);
      sum += phi.of(sK + t * (a.D + 1)) * v;
    }
    target = sum;
  }
}

}  // namespace based::cuda
