// torch's stable Tensor -> TensorView, allocation, and the choice of the backend.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "based/ops.h"

namespace based::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      return DType::kOther;
  }
}

inline Device device_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return {DeviceType::kCpu, 0};
  return {tensor.is_cuda() ? DeviceType::kCuda : DeviceType::kOther, tensor.get_device_index()};
}

// No view of an undefined tensor, which stands for an output that was not asked for.
inline TensorView view(const Tensor& tensor) {
  TensorView view;
  if (!tensor.defined()) return view;
  view.data = tensor.data_ptr();
  view.dtype = dtype_of(tensor);
  view.device = device_of(tensor);
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  view.rank = static_cast<int>(sizes.size());
  for (int i = 0; i < view.rank && i < kMaxRank; ++i) {
    view.size[i] = sizes[i];
    view.stride[i] = strides[i];
  }
  return view;
}

inline TensorView view(const OptionalTensor& tensor) {
  return tensor.has_value() ? view(*tensor) : TensorView();
}

// An uninitialised contiguous tensor of up to kMaxRank dimensions on the device of `like`.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t rank, ScalarType dtype) {
  int64_t strides[kMaxRank], stride = 1;
  for (int64_t i = rank - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto scalar_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(rank, sizes, strides, scalar_type, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(like, sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

inline ScalarType accumulator_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void raise_unless_ok(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message);
}

// torch's thread pool, so that torch.set_num_threads rules.
inline ParallelFor torch_parallel_for() {
  return {[](void*, int64_t count, ParallelFor::Body body, void* argument) {
            torch::stable::parallel_for(
                0, count, 1, [&](int64_t begin, int64_t end) { body(argument, begin, end); });
          },
          nullptr};
}

// The current CUDA stream of a device. Below torch 2.13 the stable ABI has no name for it, and
// libtorch_cuda must not be linked: it is looked up in the process.
cuda::Stream current_stream(int device_index);

[[noreturn]] void raise_no_cuda(const char* op);

template <class Params>
using CpuOp = Status (*)(const Params&, ParallelFor);

// The CUDA op of some params, and how many bytes of scratch memory it wants (null: none). A null
// run is an op without CUDA kernels in this build; cuda_ops.h has the others.
template <class Params>
struct CudaOp {
  Status (*run)(const Params&, void* workspace, cuda::Stream) = nullptr;
  int64_t (*workspace_size)(const Params&) = nullptr;
};

template <class Params>
inline constexpr CudaOp<Params> kCudaOp = {};

}  // namespace based::binding
