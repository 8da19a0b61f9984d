// phi as the kernels of linear attention build it, in shared memory and in fragments, against the
// rows of the Taylor map: products of 16-bit numbers, each rounded once.
#include "cuda_testing.h"
#include "linear_attention/features.cuh"
#include "taylor_reference.h"

namespace based::testing {
namespace {

using namespace cuda::linear;

using CudaFeatures = OnGpu;

template <class Tr>
struct FeaturesSmem {
  alignas(128) cuda::CoreTile<kChunk, Tr::kD> x;
  alignas(128) cuda::CoreTile<Tr::kPhiTokens, Tr::kF> phi;
  alignas(128) char transposed[kThreads / 32][TokenRows<Tr>::kTransposedBytes];
};

// x (kChunk, D) -> stored (kPhiTokens, kF), of the last tokens; fragments (kChunk, kF).
template <class Tr>
__global__ void __launch_bounds__(kThreads)
    features_kernel(const uint16_t* x, uint16_t* stored, uint16_t* fragments) {
  extern __shared__ __align__(128) char raw[];
  auto& smem = *reinterpret_cast<FeaturesSmem<Tr>*>(raw);
  for (int i = threadIdx.x; i < kChunk * Tr::kD; i += kThreads) {
    const int row = i / Tr::kD, c = i % Tr::kD;
    reinterpret_cast<uint16_t*>(smem.x.at(row, c / 8))[c % 8] = c < Tr::D ? x[row * Tr::D + c] : 0;
  }
  __syncthreads();
  store_features<Tr>(smem.phi, smem.x, kChunk - Tr::kPhiTokens);
  __syncthreads();
  for (int i = threadIdx.x; i < Tr::kPhiTokens * Tr::kF; i += kThreads) {
    const int c = i % Tr::kF;
    stored[i] = reinterpret_cast<const uint16_t*>(smem.phi.at(i / Tr::kF, c / 8))[c % 8];
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  TokenRows<Tr> rows;
  rows.load(smem.x, 16 * warp, smem.transposed[warp]);
  static_for<0, Tr::kF / 16>([&](auto step) {
    uint32_t a[4];
    rows.template features<decltype(step)::value>(a);
    for (int r = 0; r < 4; ++r) {
      const int row = 16 * warp + lane / 4 + r % 2 * 8;
      const int f = 16 * decltype(step)::value + lane % 4 * 2 + r / 2 * 8;
      fragments[row * Tr::kF + f] = a[r] & 0xffff;
      fragments[row * Tr::kF + f + 1] = a[r] >> 16;
    }
  });
}

template <class Element, int D>
void check_features() {
  SCOPED_TRACE("D " + std::to_string(D));
  using Tr = Traits<Element, D>;
  const SmallFloat& format = format_of<Element>();
  std::mt19937 random(D);
  std::normal_distribution<double> normal;
  std::vector<uint16_t> x(kChunk * D);
  for (uint16_t& bits : x) bits = format.encode(normal(random));
  const DeviceArray<uint16_t> gX(x), stored(Tr::kPhiTokens * Tr::kF), fragments(kChunk * Tr::kF);
  const int bytes = sizeof(FeaturesSmem<Tr>);
  cudaFuncSetAttribute(features_kernel<Tr>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  features_kernel<Tr><<<1, kThreads, bytes>>>(gX.data(), stored.data(), fragments.data());

  std::vector<TaylorRow> rows = taylor_rows(D);
  std::rotate(rows.begin(), rows.begin() + 1, rows.end());  // the constant comes last
  const auto expected = [&](int token, int f) -> uint16_t {
    if (f >= int(rows.size())) return 0;
    const auto factor = [&](int64_t i) { return i < 0 ? 1 : format.decode(x[token * D + i]); };
    return format.encode(factor(rows[f].i) * factor(rows[f].j));
  };
  int wrong = 0;
  const auto compare = [&](const char* what, const std::vector<uint16_t>& got, int first) {
    for (size_t i = 0; i < got.size(); ++i) {
      const int token = first + int(i) / Tr::kF, f = int(i) % Tr::kF;
      if (got[i] != expected(token, f) && ++wrong < 5) ADD_FAILURE() << what << token << ", " << f;
    }
  };
  compare("stored ", stored.values(), kChunk - Tr::kPhiTokens);
  compare("fragment ", fragments.values(), 0);
  EXPECT_EQ(wrong, 0);
}

TEST_F(CudaFeatures, BFloat16) {
  check_features<__nv_bfloat16, 8>(), check_features<__nv_bfloat16, 16>();
  check_features<__nv_bfloat16, 24>(), check_features<__nv_bfloat16, 32>();
}

TEST_F(CudaFeatures, Float16) {
  check_features<__half, 8>(), check_features<__half, 16>();
  check_features<__half, 24>(), check_features<__half, 32>();
}

}  // namespace
}  // namespace based::testing
