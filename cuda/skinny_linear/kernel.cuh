// A linear layer for few rows: out (N, M) = x (N, K) weight (M, K)^T + bias, N <= 64. Reading the
// weights is what takes time.
//
// A CTA owns 128 rows of the weights, with swiglu 64 rows of values and the 64 of their gates, and
// a span of K. The CTAs that share K are a cluster; each adds up its share of the cluster's sums
// through distributed shared memory, in the order of the spans. Weights are the left operand of
// wgmma, x is the right one: two warpgroups have 64 x kRows sums each, in fp32. A ninth warp has
// the copy engine bring blocks of 64 columns: of weights as many as there is room for before the
// kernels before have ended, of x, which those write, after.
#pragma once

#include "based/params.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cluster.cuh"
#include "primitives/early_launch.cuh"
#include "primitives/element.cuh"
#include "primitives/mma.cuh"
#include "primitives/tensor_copy.cuh"
#include "primitives/vector.cuh"
#include "skinny_linear/tuning.h"

namespace based::cuda {

constexpr int kSkinnyThreads = 288;

struct SkinnyArgs {
  const void* bias;  // (M,) or null
  void* out;         // (N, M) or (N, M/2), rows out_stride apart
  int64_t out_stride;
  int rows, columns;  // of out
  bool vectors;       // out can be written four elements at a time
  int blocks;         // of K
  int splits;         // CTAs of a cluster
};

// A ring of blocks: rows of 128 bytes in wgmma's 128-byte swizzle, those of the weights and then
// those of x. The sums take its place at the end.
template <int kRows>
struct SkinnyShared {
  static constexpr int kStages = skinny_stages(kRows);
  static constexpr int kWeightBytes = kSkinnyTile * 128, kXBytes = kRows * 128;
  static constexpr int kRingBytes = kStages * (kWeightBytes + kXBytes);
  static constexpr int kSumsStride = kSkinnyTile + 4;  // no two threads of a warp hit one bank
  static_assert(kRows * kSumsStride * 4 <= kRingBytes);

  alignas(1024) char ring[kRingBytes];
  Mbarrier full[kStages], empty[kStages];

  __device__ __forceinline__ uint32_t weights(int slot) const {
    return shared_address(ring) + slot * (kWeightBytes + kXBytes);
  }
  __device__ __forceinline__ uint32_t x(int slot) const { return weights(slot) + kWeightBytes; }
  // Row of x, row of the tile.
  __device__ __forceinline__ uint32_t sum(int row, int tile_row) const {
    return shared_address(ring) + (row * kSumsStride + tile_row) * 4;
  }
  __device__ __forceinline__ void init() {
    for (Mbarrier& barrier : full) barrier.init(2);   // weights and x
    for (Mbarrier& barrier : empty) barrier.init(8);  // warps that read
    fence_barrier_init();
  }
};

// What a CTA reads: blocks first ... first + count - 1 of a tile of the weights.
struct SkinnySpan {
  int tile, rank, first, count;

  __device__ __forceinline__ explicit SkinnySpan(const SkinnyArgs& a) {
    tile = blockIdx.x / a.splits, rank = blockIdx.x % a.splits;
    first = rank * a.blocks / a.splits;
    count = (rank + 1) * a.blocks / a.splits - first;
  }
};

// What the copying thread does.
template <int kRows>
struct SkinnyCopies {
  using Shared = SkinnyShared<kRows>;

  Shared& shared;
  const SkinnySpan& span;
  const CUtensorMap &weight, &x;
  int upper, lower;  // rows of the weights that the tile's halves begin with

  __device__ __forceinline__ int column(int block) const {
    return (span.first + block) * kSkinnyBlock;
  }

  __device__ __forceinline__ void copy_weights(int block) const {
    const int slot = block % Shared::kStages;
    const uint32_t to = shared.weights(slot);
    Mbarrier& full = shared.full[slot];
    full.expect(Shared::kWeightBytes);
    copy_box(to, weight, upper, column(block), full, Keep::kShort);
    copy_box(to + Shared::kWeightBytes / 2, weight, lower, column(block), full, Keep::kShort);
  }

  // What no kernel before writes.
  __device__ __forceinline__ void begin() const {
    for (int block = 0; block < min(Shared::kStages, span.count); ++block) copy_weights(block);
  }

  __device__ __forceinline__ void go_on() const {
    for (int block = 0; block < span.count; ++block) {
      const int slot = block % Shared::kStages;
      if (block >= Shared::kStages) {
        shared.empty[slot].wait((block / Shared::kStages - 1) % 2);
        copy_weights(block);
      }
      shared.full[slot].expect(Shared::kXBytes);
      copy_box(shared.x(slot), x, 0, column(block), shared.full[slot], Keep::kLong);
    }
  }
};

// sums (64, kRows) of a warpgroup.
template <class Element, int kRows>
__device__ __forceinline__ void skinny_multiply(float (&sums)[kRows / 2],
                                                SkinnyShared<kRows>& shared, int count, int group) {
  using Shared = SkinnyShared<kRows>;
#pragma unroll
  for (float& sum : sums) sum = 0.0f;
  pin(sums);
  int slot = 0, phase = 0, last = 0;
  for (int block = 0; block < count; ++block) {
    shared.full[slot].wait(phase);
    const uint64_t a =
        wgmma_swizzled_descriptor(shared.weights(slot) + group * Shared::kWeightBytes / 2);
    const uint64_t b = wgmma_swizzled_descriptor(shared.x(slot));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSkinnyBlock / 16; ++k) {
      wgmma_ss_nt<Element>(sums, a + 2 * k, b + 2 * k, true);  // 32 bytes
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (block > 0 && threadIdx.x % 32 == 0) shared.empty[last].arrive();
    last = slot;
    if (++slot == Shared::kStages) slot = 0, phase ^= 1;
  }
  wgmma_wait<0>();
  pin(sums);
}

template <int kRows>
__device__ __forceinline__ void skinny_store_sums(const float (&sums)[kRows / 2],
                                                  const SkinnyShared<kRows>& shared) {
  const int l = threadIdx.x % 32, tile_row = threadIdx.x / 32 * 16 + l / 4;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    const int row = i / 4 * 8 + l % 4 * 2 + i % 2;
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared.sum(row, tile_row + i % 4 / 2 * 8)),
                 "f"(sums[i])
                 : "memory");
  }
}

// A thread finishes four columns of the tile, in some rows.
template <bool kSwiglu>
struct SkinnyColumns {
  static constexpr int kColumns = kSwiglu ? kSkinnyTile / 2 : kSkinnyTile;  // of out, in a tile
  static constexpr int kRowsAtOnce = kSkinnyThreads / (kColumns / 4);

  int in_tile, column;  // the first of the four
  float bias[4];

  // Reads what no kernel before writes.
  template <class Element>
  __device__ __forceinline__ void load(Element, const SkinnyArgs& a, int tile) {
    in_tile = threadIdx.x % (kColumns / 4) * 4, column = tile * kColumns + in_tile;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const bool given = !kSwiglu && a.bias != nullptr && column + c < a.columns;
      bias[c] = given ? to_float(static_cast<const Element*>(a.bias)[column + c]) : 0.0f;
    }
  }
};

template <int kSplits>
__device__ __forceinline__ void add_parts(float (&sum)[4], const float4 (&parts)[kSplits]) {
#pragma unroll
  for (const float4& part : parts) {
    sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
  }
}

// out <- this CTA's share of the rows, summed over the cluster.
template <class Element, int kSplits, int kRows, bool kSwiglu>
__device__ __forceinline__ void skinny_finish(const SkinnyShared<kRows>& shared,
                                              const SkinnyArgs& a, int rank,
                                              const SkinnyColumns<kSwiglu>& columns) {
  using Columns = SkinnyColumns<kSwiglu>;
  constexpr int kBatch = kSkinnyMaxSplits / kSplits;  // rows whose parts are on their way at a time
  const int share = (a.rows + kSplits - 1) / kSplits, end = min(a.rows, (rank + 1) * share);
  const int begin = rank * share + threadIdx.x / (Columns::kColumns / 4);
  for (int first = begin; first < end; first += kBatch * Columns::kRowsAtOnce) {
    float4 parts[kBatch][kSplits], gates[kSwiglu ? kBatch : 1][kSplits];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * Columns::kRowsAtOnce;
      if (row >= end) break;
#pragma unroll
      for (int r = 0; r < kSplits; ++r) {
        parts[i][r] = load_remote(shared.sum(row, columns.in_tile), r);
        if constexpr (kSwiglu) {
          gates[i][r] = load_remote(shared.sum(row, columns.in_tile + Columns::kColumns), r);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = first + i * Columns::kRowsAtOnce;
      if (row >= end) break;
      float y[4] = {};
      add_parts(y, parts[i]);
      if constexpr (kSwiglu) {
        float gate[4] = {};
        add_parts(gate, gates[i]);
#pragma unroll
        for (int c = 0; c < 4; ++c) y[c] *= gate[c] / (1.0f + __expf(-gate[c]));
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) y[c] += columns.bias[c];
      Element* const to = static_cast<Element*>(a.out) + row * a.out_stride + columns.column;
      if (a.vectors) {
        if (columns.column < a.columns) store_vector(to, y);
      } else {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (columns.column + c < a.columns) to[c] = from_float<Element>(y[c]);
        }
      }
    }
  }
}

// weight and x are maps of boxes of 64 and kRows rows.
template <class Element, int kRows, bool kSwiglu>
__global__ void __launch_bounds__(kSkinnyThreads, 1)
    skinny_linear_kernel(const __grid_constant__ CUtensorMap weight,
                         const __grid_constant__ CUtensorMap x, const SkinnyArgs a) {
  if constexpr (kHasWgmma) {
    extern __shared__ __align__(1024) char memory[];
    auto& shared = *reinterpret_cast<SkinnyShared<kRows>*>(memory);
    using Columns = SkinnyColumns<kSwiglu>;
    const SkinnySpan span(a);
    const int upper = span.tile * Columns::kColumns;
    const SkinnyCopies<kRows> copies{shared, span,  weight,
                                     x,      upper, kSwiglu ? a.columns + upper : upper + 64};
    const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
    let_next_kernel_start();
    if (threadIdx.x == 256) {
      shared.init();
      copies.begin();
      prefetch_tensor_map(x);
    }
    Columns columns;
    columns.load(Element(), a, span.tile);
    __syncthreads();
    wait_for_earlier_kernels();  // they write x, and may still read what out is written over
    if (warp == 8) {
      if (threadIdx.x == 256) copies.go_on();
      __syncwarp();
    } else {
      float sums[kRows / 2];
      skinny_multiply<Element>(sums, shared, span.count, warp / 4);
      asm volatile("barrier.sync 1, 256;" ::: "memory");  // the ring was read
      skinny_store_sums(sums, shared);
    }
    cluster_barrier();
    const auto finish = [&](auto splits) {
      skinny_finish<Element, decltype(splits)::value>(shared, a, span.rank, columns);
    };
    if (a.splits == 8) finish(std::integral_constant<int, 8>{});
    if (a.splits == 4) finish(std::integral_constant<int, 4>{});
    if (a.splits == 2) finish(std::integral_constant<int, 2>{});
    if (a.splits == 1) finish(std::integral_constant<int, 1>{});
    cluster_barrier();  // the others have read these sums
  }
}

}  // namespace based::cuda
