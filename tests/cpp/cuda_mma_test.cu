// Fragments and tensor-core products of cuda/primitives against loops over the same numbers.
// Operands are small integers, so every sum is exact; all of a tile that is no operand is NaN.
#include "cuda_testing.h"
#include "primitives/mma.cuh"

namespace based::testing {
namespace {

using namespace cuda;

using CudaMma = OnGpu;

// A (rows, columns) matrix of integers as 16-bit numbers, and in double.
struct Matrix {
  int rows, columns;
  std::vector<uint16_t> bits;
  Values values;

  Matrix(std::mt19937& random, int rows, int columns, const SmallFloat& format)
      : rows(rows), columns(columns) {
    std::uniform_int_distribution<int> any(-100, 100);
    for (int i = 0; i < rows * columns; ++i) {
      values.push_back(any(random));
      bits.push_back(format.encode(values.back()));
    }
  }
  double at(int row, int column) const { return values[row * columns + column]; }
};

// gX (rows, columns) into the tile from (row, 8 block) on, NaN everywhere else, the padding too.
template <class Tile>
__device__ void fill(Tile& tile, const uint16_t* gX, int rows, int columns, int row, int block) {
  for (int i = threadIdx.x; i < Tile::kBytes / 2; i += blockDim.x) {
    reinterpret_cast<uint16_t*>(tile.bytes)[i] = kNan16;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
    const int c = i % columns;
    reinterpret_cast<uint16_t*>(tile.at(row + i / columns, block + c / 8))[c % 8] = gX[i];
  }
  mma_publish();
  __syncthreads();
}

// ---- fragments ---------------------------------------------------------------------------------

constexpr int kTileRows = 48, kTileColumns = 40;

// out (4, 32, 4, 2): what each loader gives each lane, from row 16 and column 8 on.
__global__ void fragments_kernel(const uint16_t* gX, uint32_t* out) {
  __shared__ __align__(16) CoreTile<kTileRows, kTileColumns> sX;
  fill(sX, gX, kTileRows, kTileColumns, 0, 0);
  uint32_t r[4][4];
  load_a(r[0], sX, 16, 1);
  load_a_transposed(r[1], sX, 16, 1);
  load_b(r[2], sX, 16, 1);
  load_b_transposed(r[3], sX, 16, 1);
  for (int loader = 0; loader < 4; ++loader) {
    for (int i = 0; i < 4; ++i) out[(loader * 32 + threadIdx.x) * 4 + i] = r[loader][i];
  }
}

TEST_F(CudaMma, Fragments) {
  std::vector<uint16_t> x(kTileRows * kTileColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i);
  const DeviceArray<uint16_t> gX(x);
  const DeviceArray<uint16_t> out(4 * 32 * 4 * 2);
  fragments_kernel<<<1, 32>>>(gX.data(), reinterpret_cast<uint32_t*>(out.data()));
  const std::vector<uint16_t> got = out.values();
  const auto element = [&](int row, int column) {
    return x[(16 + row) * kTileColumns + 8 + column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      for (int i = 0; i < 2; ++i) {
        const auto loaded = [&](int loader) { return got[((loader * 32 + lane) * 4 + r) * 2 + i]; };
        const int m = lane / 4 + r % 2 * 8, k = lane % 4 * 2 + r / 2 * 8 + i;
        EXPECT_EQ(loaded(0), element(m, k)) << lane << " " << r;
        EXPECT_EQ(loaded(1), element(k, m)) << lane << " " << r;
        const int n = lane / 4 + r / 2 * 8, kb = lane % 4 * 2 + r % 2 * 8 + i;
        EXPECT_EQ(loaded(2), element(kb, n)) << lane << " " << r;
        EXPECT_EQ(loaded(3), element(n, kb)) << lane << " " << r;
      }
    }
  }
}

// out (48, 40) = x, whose 16 x 16 elements from (16, 8) on are fragments in between.
__global__ void store_matrix_kernel(const uint16_t* gX, uint16_t* out) {
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(16) CoreTile<kTileRows, kTileColumns> sX, sCopy;
  fill(sX, gX, kTileRows, kTileColumns, 0, 0);
  fill(sCopy, gX, 0, kTileColumns, 0, 0);
  const int lane = threadIdx.x % 32;
  uint32_t a[4];
  load_a(a, sX, 16, 1);
  store_matrix_x4(sCopy.address(16 + lane % 16, 1 + lane / 16), a);
  __syncthreads();
  for (int i = lane; i < kTileRows * kTileColumns; i += 32) {
    const int row = i / kTileColumns, column = i % kTileColumns;
    out[i] = reinterpret_cast<const uint16_t*>(sCopy.at(row, column / 8))[column % 8];
  }
#endif
}

TEST_F(CudaMma, StoreMatrix) {
  if (!runs_sm90(reinterpret_cast<const void*>(store_matrix_kernel))) {
    GTEST_SKIP() << "stmatrix needs code for sm_90";
  }
  std::vector<uint16_t> x(kTileRows * kTileColumns);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i);
  const DeviceArray<uint16_t> gX(x), out(x.size());
  store_matrix_kernel<<<1, 32>>>(gX.data(), out.data());
  const std::vector<uint16_t> got = out.values();
  for (int i = 0; i < int(x.size()); ++i) {
    const int row = i / kTileColumns, column = i % kTileColumns;
    const bool stored = row >= 16 && row < 32 && column >= 8 && column < 24;
    EXPECT_EQ(got[i], stored ? x[i] : kNan16) << row << ", " << column;
  }
}

// ---- products of a warpgroup -------------------------------------------------------------------

constexpr int kM = 64, kK = 32;
enum class Product { kAB, kABt, kAtB };

// gD (64, N) (+)= A (64, 32) times B (32, N), as two products of 16 k each. A is gA (64, 32), for
// kAtB gA (32, 64) transposed; B is gB (32, N), for kABt gB (N, 32) transposed. kAsync false asks
// for mma.sync where there is wgmma.
template <class Element, Product kProduct, int N, bool kAsync>
__global__ void product_kernel(const uint16_t* gA, const uint16_t* gB, float* gD, bool accumulate) {
  constexpr bool kTransposedA = kProduct == Product::kAtB;
  constexpr bool kTransposedB = kProduct == Product::kABt;
  __shared__ __align__(16) CoreTile<(kTransposedA ? kK : kM) + 16, (kTransposedA ? kM : kK) + 8> sA;
  __shared__ __align__(16) CoreTile<(kTransposedB ? N : kK) + 16, (kTransposedB ? kK : N) + 16> sB;
  fill(sA, gA, kTransposedA ? kK : kM, kTransposedA ? kM : kK, 16, 1);
  fill(sB, gB, kTransposedB ? N : kK, kTransposedB ? kK : N, 8, 1);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto at = [&](int i) -> float& {
    const int row = 16 * warp + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    return gD[row * N + column];
  };
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = accumulate ? at(i) : __int_as_float(0x7fffffff);
  uint32_t a[kK / 16][4];
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    if constexpr (!kTransposedA) load_a(a[step], sA, 16 + 16 * warp, 1 + 2 * step);
  }
  mma_begin(d);
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    const bool add = accumulate || step > 0;
    if constexpr (kProduct == Product::kAB) {
      mma_AB<Element, N, kAsync && kHasWgmma>(d, a[step], sB, 8 + 16 * step, 1, add);
    } else if constexpr (kProduct == Product::kABt) {
      mma_ABt<Element, N, kAsync && kHasWgmma>(d, a[step], sB, 8, 1 + 2 * step, add);
    } else {
      mma_AtB<Element, N>(d, sA, 16 + 16 * step, 1, sB, 8 + 16 * step, 1);
    }
  }
  mma_commit();
  mma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) at(i) = d[i];
}

template <class Element, Product kProduct, int N, bool kAsync>
void check(bool accumulate) {
  SCOPED_TRACE("N " + std::to_string(N) + (kAsync ? " async" : "") + (accumulate ? " +=" : " ="));
  constexpr bool kTransposedA = kProduct == Product::kAtB;
  constexpr bool kTransposedB = kProduct == Product::kABt;
  std::mt19937 random(N);
  const SmallFloat& format = format_of<Element>();
  const Matrix a(random, kTransposedA ? kK : kM, kTransposedA ? kM : kK, format);
  const Matrix b(random, kTransposedB ? N : kK, kTransposedB ? kK : N, format);
  const Matrix before(random, kM, N, format);
  const DeviceArray<uint16_t> gA(a.bits), gB(b.bits);
  const DeviceArray<float> gD(std::vector<float>(before.values.begin(), before.values.end()));
  product_kernel<Element, kProduct, N, kAsync>
      <<<1, 128>>>(gA.data(), gB.data(), gD.data(), accumulate);
  const std::vector<float> got = gD.values();
  int wrong = 0;
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < N; ++n) {
      double sum = accumulate ? before.at(m, n) : 0;
      for (int k = 0; k < kK; ++k) {
        sum += (kTransposedA ? a.at(k, m) : a.at(m, k)) * (kTransposedB ? b.at(n, k) : b.at(k, n));
      }
      if (!(got[m * N + n] == sum) && ++wrong < 5) ADD_FAILURE() << m << ", " << n;
    }
  }
  EXPECT_EQ(wrong, 0);
}

template <class Element, Product kProduct, int... kN>
void check_each() {
  for (bool accumulate : {false, true}) {
    (check<Element, kProduct, kN, true>(accumulate), ...);
    (check<Element, kProduct, kN, false>(accumulate), ...);
  }
}

TEST_F(CudaMma, AB) {
  check_each<__nv_bfloat16, Product::kAB, 32, 48, 64, 72, 80>();
  check_each<__half, Product::kAB, 32, 48, 64, 72, 80>();
}

TEST_F(CudaMma, ABt) {
  check_each<__nv_bfloat16, Product::kABt, 32, 48, 64, 72, 80>();
  check_each<__half, Product::kABt, 32, 48, 64, 72, 80>();
}

template <class Element, int... kN>
void check_AtB() {
  (check<Element, Product::kAtB, kN, true>(true), ...);
}

TEST_F(CudaMma, AtB) {
  check_AtB<__nv_bfloat16, 8, 24, 48, 80, 144, 160, 168>();
  check_AtB<__half, 8, 24, 48, 80, 144, 160, 168>();
}

}  // namespace
}  // namespace based::testing
