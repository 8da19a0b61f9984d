// based_ops.set_checks: index tensors that live on a GPU are copied to the host and checked before
// the kernel runs, as they always are on the CPU. It synchronises with the stream.
#pragma once

#include <vector>

#include "tensor.h"
#include "validate.h"

namespace based::binding {

// On from the start when the environment says BASED_CHECKS=1.
bool& checks_enabled();

// A contiguous copy of a CUDA vector in host memory, in order after the current stream's work.
inline Tensor host_copy(const TensorView& vector) {
  const auto scalar_type = vector.dtype == DType::kInt32 ? ScalarType::Int : ScalarType::Long;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type));
  const int64_t one = 1;
  AtenTensorHandle on_device = nullptr, on_host = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      vector.data, 1, vector.size, vector.stride, 0, dtype, aoti_torch_device_type_cuda(),
      vector.device.index, &on_device));
  const Tensor source(on_device);
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, vector.size, &one, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &on_host));
  const Tensor copy(on_host);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), source.get(), 0));
  return copy;
}

template <class Params>
void check_indices_on_host(Params params) {
  raise_unless_ok(validate(params));
  std::vector<Tensor> copies;
  for (TensorView* vector : index_tensors(params)) {
    if (vector == nullptr || vector->rank < 0) continue;
    copies.push_back(host_copy(*vector));
    *vector = view(copies.back());
  }
  raise_unless_ok(validate_indices(params));
}

}  // namespace based::binding
