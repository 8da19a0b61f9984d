// What the ops have in common: the way to a device, and the sizes of outputs.
#pragma once

#include "checks.h"
#include "cuda_ops.h"

namespace based::binding {

// Runs an op on the device of `first`.
template <class Params>
void run(const char* op, const Tensor& first, const Params& params, CpuOp<Params> cpu_op) {
  if (first.is_cpu()) return raise_unless_ok(cpu_op(params, torch_parallel_for()));
  constexpr CudaOp<Params> cuda_op = kCudaOp<Params>;
  if (cuda_op.run == nullptr) raise_no_cuda(op);
  const int device = first.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (checks_enabled()) check_indices_on_host(params);
  const int64_t bytes = cuda_op.workspace_size == nullptr ? 0 : cuda_op.workspace_size(params);
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = empty(first, {bytes}, ScalarType::Byte);
  raise_unless_ok(
      cuda_op.run(params, bytes > 0 ? workspace->data_ptr() : nullptr, current_stream(device)));
}

// Size i of a tensor, 0 when it has no such dimension: the op's own check then reports the shape.
inline int64_t size_of(const Tensor& tensor, int64_t i) {
  return i < tensor.dim() ? tensor.size(i) : 0;
}

// Fresh and contiguous, in the shape of a tensor; a rank no op accepts gets a placeholder.
inline Tensor fresh_like(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  if (sizes.size() > kMaxRank) return empty(tensor, {0}, tensor.scalar_type());
  return empty(tensor, sizes.data(), sizes.size(), tensor.scalar_type());
}

// Undefined, None in Python, without a tensor.
inline Tensor fresh_like(const OptionalTensor& tensor) {
  return tensor.has_value() ? fresh_like(*tensor) : Tensor();
}

inline int64_t sequences_of(const OptionalTensor& cu_seqlens, int64_t batch) {
  if (!cu_seqlens.has_value()) return batch;
  const int64_t entries = size_of(*cu_seqlens, 0);
  return entries > 0 ? entries - 1 : 0;
}

}  // namespace based::binding
