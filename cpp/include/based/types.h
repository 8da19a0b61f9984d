// Types shared by every op: element types, tensor views, Status and the CPU parallel_for callback.
// No torch, no CUDA header, no exceptions.
#pragma once

#include <cstdint>

namespace based {

enum class DType : uint8_t { kFloat32, kBFloat16, kFloat16, kFloat64, kInt32, kInt64, kOther };

enum class DeviceType : uint8_t { kCpu, kCuda, kOther };

struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;  // always 0 for the CPU
};

constexpr int kMaxRank = 4;

// A borrowed tensor: pointer, element type, shape and strides in elements. rank < 0 means "not
// given"; an empty tensor is given and may have a null pointer. A rank above kMaxRank is an error
// that every op reports; only the first kMaxRank sizes are then set.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  int rank = -1;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};
};

// A contiguous view; negative sizes after the first end the shape.
inline TensorView contiguous_view(void* data, DType dtype, int64_t s0, int64_t s1 = -1,
                                  int64_t s2 = -1, int64_t s3 = -1) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  const int64_t sizes[kMaxRank] = {s0, s1, s2, s3};
  for (view.rank = 0; view.rank < kMaxRank && sizes[view.rank] >= 0; ++view.rank) {
    view.size[view.rank] = sizes[view.rank];
  }
  int64_t stride = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    view.stride[i] = stride;
    stride *= view.size[i];
  }
  return view;
}

enum class StatusCode : uint8_t { kOk, kInvalidArgument, kUnsupported, kOutOfMemory, kCudaError };

// Outcome of a call. A failed one carries "<op>: <argument>: expected <...>, got <...>".
struct [[nodiscard]] Status {
  StatusCode code = StatusCode::kOk;
  char message[384] = {};

  bool ok() const { return code == StatusCode::kOk; }
};

// How CPU ops spread work: run(context, count, body, argument) calls body(argument, begin, end) on
// disjoint ranges that cover [0, count), and returns when all are done. A null run means
// std::thread, one thread per hardware core.
struct ParallelFor {
  using Body = void (*)(void* argument, int64_t begin, int64_t end);
  void (*run)(void* context, int64_t count, Body body, void* argument) = nullptr;
  void* context = nullptr;
};

}  // namespace based
