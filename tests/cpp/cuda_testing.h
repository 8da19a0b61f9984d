// For the tests of cuda/primitives: memory on the GPU, and a word when there is no GPU to run on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "testing.h"

namespace based::testing {

class OnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no GPU is visible here";
    }
    cudaDeviceGetAttribute(&major_, cudaDevAttrComputeCapabilityMajor, 0);
  }

  // Whether a kernel runs code for sm_90 or newer here, and not an older GPU's.
  bool runs_sm90(const void* kernel) const {
    cudaFuncAttributes code;
    EXPECT_EQ(cudaFuncGetAttributes(&code, kernel), cudaSuccess);
    return major_ >= 9 && code.ptxVersion >= 90;
  }

 private:
  int major_ = 0;  // of the compute capability
};

// Elements on the GPU, copied there and back.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    EXPECT_EQ(cudaMalloc(&data_, size_ * sizeof(T) + 1), cudaSuccess);
    copy(data_, values.data(), cudaMemcpyHostToDevice);
  }
  // Poison: NaN as any floating-point type, -1 as an integer.
  explicit DeviceArray(size_t size) : size_(size) {
    EXPECT_EQ(cudaMalloc(&data_, size_ * sizeof(T) + 1), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, 0xff, size_ * sizeof(T)), cudaSuccess);
  }
  DeviceArray(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }

  // After all kernels so far, which must have succeeded.
  std::vector<T> values() const {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
    std::vector<T> values(size_);
    copy(values.data(), data_, cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) const {
    EXPECT_EQ(cudaMemcpy(to, from, size_ * sizeof(T), kind), cudaSuccess);
  }

  size_t size_;
  T* data_ = nullptr;
};

template <class Element>
constexpr const SmallFloat& format_of() {
  return std::is_same_v<Element, __half> ? kFloat16Format : kBFloat16Format;
}

constexpr uint16_t kNan16 = 0x7fff;  // in both 16-bit formats

}  // namespace based::testing
