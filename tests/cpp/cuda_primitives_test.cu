// Copies, barriers, vectors, index arithmetic and Taylor rows of cuda/primitives, each against a
// loop on the host.
#include "cuda_testing.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cp_async.cuh"
#include "primitives/decode_row.cuh"
#include "primitives/mbarrier.cuh"
#include "primitives/taylor.cuh"
#include "primitives/vector.cuh"
#include "taylor_reference.h"

namespace based::testing {
namespace {

using namespace cuda;

using CudaPrimitives = OnGpu;

std::vector<int> counted(int count) {
  std::vector<int> numbers(count);
  for (int i = 0; i < count; ++i) numbers[i] = 7 * i + 1;
  return numbers;
}

// ---- tiles -------------------------------------------------------------------------------------

// A number for each 16 bytes, written through at(), read where core matrices are said to lie.
template <class Tile>
__global__ void core_tile_kernel(int* out) {
  __shared__ __align__(16) Tile tile;
  const int row = threadIdx.x % 24, block = threadIdx.x / 24;
  *reinterpret_cast<int*>(tile.at(row, block)) = threadIdx.x;
  __syncthreads();
  const char* core = tile.bytes + block * Tile::kColStride + row / 8 * Tile::kRowStride;
  out[threadIdx.x] = *reinterpret_cast<const int*>(core + row % 8 * 16);
  const bool same = tile.address(row, block) == shared_address(tile.at(row, block));
  if (!same || tile.at(row, block) + 16 > tile.bytes + Tile::kBytes) out[threadIdx.x] = -2;
}

template <class Tile>
void check_core_tile() {
  const DeviceArray<int> out(24 * 5);
  core_tile_kernel<Tile><<<1, 24 * 5>>>(out.data());
  const std::vector<int> got = out.values();
  for (int i = 0; i < 24 * 5; ++i) EXPECT_EQ(got[i], i);
}

TEST_F(CudaPrimitives, CoreTile) { check_core_tile<cuda::CoreTile<24, 40>>(); }

// ---- copies ------------------------------------------------------------------------------------

// out (2, 128): the first of four numbers that 16 bytes bring, every third of them not valid; then
// single numbers, in the opposite order.
__global__ void cp_async_kernel(const int* gX, int* out) {
  __shared__ __align__(16) int sWide[128][4];
  __shared__ int sNarrow[128];
  const int t = threadIdx.x;
  sWide[t][0] = sNarrow[t] = -3;
  cp_async_16(shared_address(sWide[t]), gX + 4 * t, t % 3 != 0);
  cp_async_commit();
  cp_async_4(shared_address(&sNarrow[t]), gX + 127 - t);
  cp_async_commit();
  cp_async_wait<1>();
  out[t] = sWide[t][0];
  cp_async_wait<0>();
  __syncthreads();
  out[128 + t] = sNarrow[(t + 64) % 128];
}

TEST_F(CudaPrimitives, CpAsync) {
  const std::vector<int> x = counted(4 * 128);
  const DeviceArray<int> gX(x), out(2 * 128);
  cp_async_kernel<<<1, 128>>>(gX.data(), out.data());
  const std::vector<int> got = out.values();
  for (int t = 0; t < 128; ++t) {
    EXPECT_EQ(got[t], t % 3 != 0 ? x[4 * t] : 0) << t;
    EXPECT_EQ(got[128 + t], x[127 - (t + 64) % 128]) << t;
  }
}

// Rounds of a bulk copy of 64 * (1 + round) numbers into the same place; out (rounds, 256).
__global__ void bulk_copy_kernel(const int* gX, int* out, int rounds) {
  __shared__ __align__(16) int sX[256];
  __shared__ CopyBarrier barrier;
  const int t = threadIdx.x;
  if (t == 0) {
    barrier.init();
    fence_barrier_init();
  }
  for (int round = 0; round < rounds; ++round) {
    sX[t] = -round;
    fence_proxy_async();
    __syncthreads();
    if (t == 0) barrier.copy(sX, gX + 64 * round, 64 * (1 + round) * sizeof(int));
    barrier.wait(round % 2);
    out[256 * round + t] = sX[t];
    __syncthreads();
  }
}

TEST_F(CudaPrimitives, BulkCopy) {
  if (!runs_sm90(reinterpret_cast<const void*>(bulk_copy_kernel))) {
    GTEST_SKIP() << "bulk copies need code for sm_90";
  }
  const int rounds = 4;
  const std::vector<int> x = counted(64 * 8);
  const DeviceArray<int> gX(x), out(256 * rounds);
  bulk_copy_kernel<<<1, 256>>>(gX.data(), out.data(), rounds);
  const std::vector<int> got = out.values();
  for (int round = 0; round < rounds; ++round) {
    for (int t = 0; t < 256; ++t) {
      const int expected = t < 64 * (1 + round) ? x[64 * round + t] : -round;
      EXPECT_EQ(got[256 * round + t], expected) << round << ", " << t;
    }
  }
}

// ---- barriers ----------------------------------------------------------------------------------

// Threads 0 ... 63 hand numbers to 64 ... 127, one slot each, round by round.
__global__ void hand_over_kernel(int* out, int rounds) {
  __shared__ Mbarrier full, empty;
  __shared__ int slot[64];
  const int t = threadIdx.x % 64;
  if (threadIdx.x == 0) full.init(64), empty.init(64);
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 64) {
      empty.wait(round % 2 ^ 1);  // the phase before the first counts as over
      slot[t] = 64 * round + t;
      full.arrive();
    } else {
      full.wait(round % 2);
      out[64 * round + t] = slot[63 - t];
      empty.arrive();
    }
  }
}

TEST_F(CudaPrimitives, Mbarrier) {
  const int rounds = 20;
  const DeviceArray<int> out(64 * rounds);
  hand_over_kernel<<<1, 128>>>(out.data(), rounds);
  const std::vector<int> got = out.values();
  for (int i = 0; i < 64 * rounds; ++i) EXPECT_EQ(got[i], i / 64 * 64 + 63 - i % 64);
}

// A thread reads what another one's cp.async brought, after the barrier only.
__global__ void arrive_after_copies_kernel(const int* gX, int* out, int rounds) {
  __shared__ __align__(16) int sX[128][4];
  __shared__ Mbarrier barrier;
  const int t = threadIdx.x;
  if (t == 0) barrier.init(128);
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    cp_async_16(shared_address(sX[t]), gX + 4 * (t + round), true);
    barrier.arrive_after_copies();
    barrier.wait(round % 2);
    out[128 * round + t] = sX[(t + 37) % 128][t % 4];
    __syncthreads();
  }
}

TEST_F(CudaPrimitives, ArriveAfterCopies) {
  const int rounds = 5;
  const std::vector<int> x = counted(4 * (128 + rounds));
  const DeviceArray<int> gX(x), out(128 * rounds);
  arrive_after_copies_kernel<<<1, 128>>>(gX.data(), out.data(), rounds);
  const std::vector<int> got = out.values();
  for (int i = 0; i < 128 * rounds; ++i) {
    EXPECT_EQ(got[i], x[4 * ((i % 128 + 37) % 128 + i / 128) + i % 4]) << i;
  }
}

// ---- vectors -----------------------------------------------------------------------------------

// wide = x, narrow = the nearest Element of y; kVec a thread.
template <int kVec, class Element>
__global__ void vector_kernel(const Element* x, float* wide, const float* y, Element* narrow) {
  const int first = threadIdx.x * kVec;
  const Vector<Element, kVec> vector = load_vector<kVec>(x + first);
  float floats[kVec];
  for (int i = 0; i < kVec; ++i) wide[first + i] = vector[i], floats[i] = y[first + i];
  store_vector(narrow + first, floats);
}

template <int kVec, class Element>
void check_vectors(DType dtype) {
  constexpr int kCount = 32 * kVec;
  std::mt19937 random(kVec);
  const Tensor x = random_tensor(random, dtype, {kCount}),
               y = random_tensor(random, DType::kFloat32, {kCount});
  const auto elements = [](const Tensor& tensor) {
    const auto* data = reinterpret_cast<const Element*>(tensor.bytes.data());
    return std::vector<Element>(data, data + tensor.count());
  };
  const Values values = y.values();
  const DeviceArray<Element> gX(elements(x)), narrow(kCount);
  const DeviceArray<float> gY(std::vector<float>(values.begin(), values.end())), wide(kCount);
  vector_kernel<kVec><<<1, 32>>>(gX.data(), wide.data(), gY.data(), narrow.data());
  const std::vector<float> got = wide.values();
  Tensor rounded(dtype, {kCount}), expected(dtype, {kCount});
  std::memcpy(rounded.bytes.data(), narrow.values().data(), rounded.bytes.size());
  expected.assign(values);
  for (int i = 0; i < kCount; ++i) {
    EXPECT_EQ(got[i], x.get(i)) << name(dtype) << " x " << kVec << ": " << i;
    EXPECT_EQ(rounded.get(i), expected.get(i)) << name(dtype) << " x " << kVec << ": " << i;
  }
}

TEST_F(CudaPrimitives, Vectors) {
  check_vectors<1, float>(DType::kFloat32), check_vectors<4, float>(DType::kFloat32);
  check_vectors<1, __nv_bfloat16>(DType::kBFloat16),
      check_vectors<2, __nv_bfloat16>(DType::kBFloat16);
  check_vectors<8, __nv_bfloat16>(DType::kBFloat16);
  check_vectors<1, __half>(DType::kFloat16), check_vectors<2, __half>(DType::kFloat16);
  check_vectors<8, __half>(DType::kFloat16);
}

TEST(CudaHost, RowsAreVectors) {
  alignas(16) char memory[32];
  TensorView view;
  view.data = memory, view.rank = 3;
  const auto set = [&](std::initializer_list<int64_t> size, std::initializer_list<int64_t> stride) {
    std::copy(size.begin(), size.end(), view.size);
    std::copy(stride.begin(), stride.end(), view.stride);
  };
  set({5, 3, 16}, {48, 16, 1});
  EXPECT_TRUE(rows_are_vectors(view, 8, 2));
  EXPECT_TRUE(rows_are_vectors(TensorView(), 8, 2));  // no tensor
  view.data = memory + 2;
  EXPECT_FALSE(rows_are_vectors(view, 8, 2));
  EXPECT_TRUE(rows_are_vectors(view, 1, 2));
  view.data = memory;
  set({5, 3, 12}, {48, 16, 1});  // a part of a vector is left over
  EXPECT_FALSE(rows_are_vectors(view, 8, 2));
  set({5, 3, 16}, {50, 16, 1});  // rows begin inside a vector
  EXPECT_FALSE(rows_are_vectors(view, 8, 2));
  set({1, 3, 16}, {50, 16, 1});  // but there is only one of them
  EXPECT_TRUE(rows_are_vectors(view, 8, 2));
}

// ---- sequences and slots -----------------------------------------------------------------------

// spans (T + N): the sequence of every token, then every sequence.
__global__ void spans_kernel(IndexVector bounds, int64_t T, Span* spans) {
  const int64_t i = threadIdx.x, N = bounds.size - 1;
  if (i < T) spans[i] = sequence_at(bounds, i, T);
  if (i < N) spans[T + i] = sequence(bounds, i, T);
}

TEST_F(CudaPrimitives, Sequences) {
  const int64_t T = 12;
  const std::vector<std::vector<int64_t>> all = {
      {0, 12},     {0, 5, 12}, {0, 0, 5, 5, 5, 12, 12}, {0, 1, 2, 3, 12}, {3, 5, 9}, {0, 40},
      {-4, 5, 12}, {12}};
  for (const std::vector<int64_t>& bounds : all) {
    for (DType dtype : {DType::kInt32, DType::kInt64}) {
      const int64_t N = int64_t(bounds.size()) - 1;
      Tensor strided(dtype, {N + 1, 2});
      for (int64_t i = 0; i <= N; ++i) strided.set(2 * i, double(bounds[i]));
      const DeviceArray<unsigned char> data(strided.bytes);
      const DeviceArray<Span> spans(T + N);
      spans_kernel<<<1, 32>>>({data.data(), 2, N + 1, dtype == DType::kInt32}, T, spans.data());
      const std::vector<Span> got = spans.values();
      const auto inside = [&](int64_t t) { return std::min(std::max(t, int64_t(0)), T); };
      for (int64_t t = 0; t < T; ++t) {
        Span expected = {-1, t, t + 1};
        for (int64_t n = 0; n < N; ++n) {
          if (bounds[n] <= t && t < bounds[n + 1]) {
            expected = {n, inside(bounds[n]), inside(bounds[n + 1])};
          }
        }
        EXPECT_EQ(got[t].n, expected.n) << t;
        EXPECT_EQ(got[t].begin, expected.begin) << t;
        EXPECT_EQ(got[t].end, expected.end) << t;
      }
      for (int64_t n = 0; n < N; ++n) {
        const bool good = bounds[n] >= 0 && bounds[n + 1] >= bounds[n] && bounds[n + 1] <= T;
        EXPECT_EQ(got[T + n].n, good ? n : -1) << n;
        if (good) EXPECT_EQ(got[T + n].begin, bounds[n]) << n;
        if (good) EXPECT_EQ(got[T + n].end, bounds[n + 1]) << n;
      }
    }
  }
}

__global__ void decode_row_kernel(IndexVector indices, int64_t slots, DecodeRow* rows, float* out) {
  rows[threadIdx.x] = decode_row(indices, threadIdx.x, slots);
  out[threadIdx.x] = filler(rows[threadIdx.x].kind);
}

TEST_F(CudaPrimitives, DecodeRows) {
  const std::vector<int64_t> indices = {4, -1, 0, 5, -2, int64_t(1) << 40, 3, 1};
  const DeviceArray<int64_t> given(indices);
  const DeviceArray<DecodeRow> rows(8);
  const DeviceArray<float> fillers(8);
  decode_row_kernel<<<1, 8>>>({given.data(), 1, 8, false}, 5, rows.data(), fillers.data());
  const std::vector<DecodeRow> got = rows.values();
  const std::vector<float> out = fillers.values();
  for (size_t b = 0; b < 8; ++b) {
    const bool skipped = indices[b] == -1, run = indices[b] >= 0 && indices[b] < 5;
    EXPECT_EQ(int(got[b].kind), int(run       ? RowKind::kRun
                                    : skipped ? RowKind::kSkip
                                              : RowKind::kBad));
    if (run) EXPECT_EQ(got[b].slot, indices[b]);
    if (skipped) EXPECT_EQ(out[b], 0);
    if (!run && !skipped) EXPECT_TRUE(std::isnan(out[b])) << b;
  }
  decode_row_kernel<<<1, 8>>>({nullptr, 0, 0, false}, 8, rows.data(), fillers.data());
  const std::vector<DecodeRow> own = rows.values();
  for (int b = 0; b < 8; ++b) EXPECT_EQ(own[b].slot, b);
}

// ---- Taylor rows -------------------------------------------------------------------------------

__global__ void taylor_rows_kernel(int D, float root, cuda::TaylorRow* rows) {
  rows[threadIdx.x] = taylor_row(threadIdx.x, D, root);
}

TEST_F(CudaPrimitives, TaylorRows) {
  for (int D : {1, 2, 3, 8, 15, 16, 24, 32}) {
    const float root = 0.7f;
    const std::vector<testing::TaylorRow> expected = taylor_rows(D);
    const DeviceArray<cuda::TaylorRow> rows(expected.size());
    taylor_rows_kernel<<<1, unsigned(expected.size())>>>(D, root, rows.data());
    const std::vector<cuda::TaylorRow> got = rows.values();
    for (size_t f = 0; f < expected.size(); ++f) {
      const auto [coefficient, i, j] = expected[f];
      EXPECT_EQ(got[f].i, i) << D << ", " << f;
      EXPECT_EQ(got[f].j, j) << D << ", " << f;
      const double roots = (i >= 0 ? root : 1) * (j >= 0 ? root : 1);
      EXPECT_NEAR(got[f].coefficient, coefficient * roots, 1e-6) << D << ", " << f;
    }
  }
}

}  // namespace
}  // namespace based::testing
