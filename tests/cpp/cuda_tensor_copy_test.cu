// Boxes that the copy engine brings, products of them, and sums over a cluster: a (64, N) product
// whose two CTAs have half of k each. Operands are small integers, so every sum is exact.
#include "cuda_testing.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cluster.cuh"
#include "primitives/mma.cuh"
#include "primitives/tensor_copy.cuh"
#include "primitives/tensor_map.h"

namespace based::testing {
namespace {

using namespace cuda;

using CudaTensorCopy = OnGpu;

constexpr int kRowsA = 70, kFirstA = 20;          // rows of A from 70 on read as 0
constexpr int kColumns = 120, kFirstColumn = 16;  // the boxes of the second CTA end beyond these
constexpr int kLd = 64 + 4;

template <int N>
struct Shared {
  alignas(1024) char a[64 * 128];
  alignas(1024) char b[N * 128];
  alignas(16) float sums[N * kLd];
  Mbarrier full;
};

// out (N, 64) <- (A[20 ... 83] B[0 ... N-1]^T)^T over columns 16 ... 143, gB has N - 3 rows.
template <class Element, int N>
__global__ void __launch_bounds__(128)
    box_product_kernel(const __grid_constant__ CUtensorMap gA,
                       const __grid_constant__ CUtensorMap gB, float* out) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(1024) char memory[];
    auto& [sA, sB, sums, full] = *reinterpret_cast<Shared<N>*>(memory);
    const int lane = threadIdx.x % 32, rank = blockIdx.x % 2, column = kFirstColumn + 64 * rank;
    if (threadIdx.x == 0) {
      full.init(1);
      fence_barrier_init();
      full.expect(sizeof(sA) + sizeof(sB));
      copy_box(shared_address(sA), gA, kFirstA, column, full, Keep::kShort);
      copy_box(shared_address(sB), gB, 0, column, full, Keep::kLong);
    }
    __syncthreads();
    full.wait(0);
    const uint64_t a = wgmma_swizzled_descriptor(shared_address(sA));
    const uint64_t b = wgmma_swizzled_descriptor(shared_address(sB));
    float d[N / 2];
    mma_begin(d);
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_ss_nt<Element>(d, a + 2 * k, b + 2 * k, k > 0);
    mma_commit();
    mma_wait<0>(d);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const int row = threadIdx.x / 32 * 16 + lane / 4 + i % 4 / 2 * 8;
      sums[(i / 4 * 8 + lane % 4 * 2 + i % 2) * kLd + row] = d[i];
    }
    cluster_barrier();
    for (int i = threadIdx.x; i < N * 16; i += 128) {
      const int n = i / 16, row = i % 16 * 4;
      if (n % 2 != rank) continue;
      const uint32_t at = shared_address(sums + n * kLd + row);
      const float4 x = load_remote(at, 0), y = load_remote(at, 1);
      float* to = out + n * 64 + row;
      to[0] = x.x + y.x, to[1] = x.y + y.y, to[2] = x.z + y.z, to[3] = x.w + y.w;
    }
    cluster_barrier();
  }
}

template <class Element, int N>
void check() {
  SCOPED_TRACE(N);
  const auto kernel = box_product_kernel<Element, N>;
  ASSERT_EQ(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared<N>)),
      cudaSuccess);
  std::mt19937 random(N);
  std::uniform_int_distribution<int> any(-100, 100);
  const auto draw = [&](int rows) {
    std::vector<uint16_t> bits;
    Values values;
    for (int i = 0; i < rows * kColumns; ++i) {
      values.push_back(any(random));
      bits.push_back(format_of<Element>().encode(values.back()));
    }
    return std::pair{bits, values};
  };
  const auto [bits_a, a] = draw(kRowsA);
  const auto [bits_b, b] = draw(N - 3);
  const DeviceArray<uint16_t> gA(bits_a), gB(bits_b);
  const DeviceArray<float> out(64 * N);
  const DType dtype = std::is_same_v<Element, __half> ? DType::kFloat16 : DType::kBFloat16;
  CUtensorMap map_a, map_b;
  ASSERT_EQ(make_tensor_map(&map_a, contiguous_view(gA.data(), dtype, kRowsA, kColumns), 64),
            cudaSuccess);
  ASSERT_EQ(make_tensor_map(&map_b, contiguous_view(gB.data(), dtype, N - 3, kColumns), N),
            cudaSuccess);
  launch_clusters<CUtensorMap, CUtensorMap, float*>(kernel, 1, 2, 128, sizeof(Shared<N>), false,
                                                    nullptr, map_a, map_b, out.data());
  const std::vector<float> got = out.values();
  int wrong = 0;
  for (int n = 0; n < N; ++n) {
    for (int m = 0; m < 64; ++m) {
      double sum = 0;
      for (int k = kFirstColumn; k < kColumns; ++k) {
        if (n < N - 3 && kFirstA + m < kRowsA) {
          sum += a[(kFirstA + m) * kColumns + k] * b[n * kColumns + k];
        }
      }
      if (!(got[n * 64 + m] == sum) && ++wrong < 5) ADD_FAILURE() << n << ", " << m;
    }
  }
  EXPECT_EQ(wrong, 0);
}

template <class Element>
void check_each() {
  check<Element, 8>();
  check<Element, 16>();
  check<Element, 32>();
  check<Element, 64>();
}

TEST_F(CudaTensorCopy, Product) {
  int minor = -1;
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  const auto kernel = reinterpret_cast<const void*>(box_product_kernel<__half, 8>);
  if (!runs_sm90(kernel) || minor != 0) GTEST_SKIP() << "wgmma needs code for sm_90a";
  check_each<__nv_bfloat16>();
  check_each<__half>();
}

}  // namespace
}  // namespace based::testing
