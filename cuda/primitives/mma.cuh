// Tensor-core products of a warpgroup (128 threads) on core-matrix tiles, 16-bit operands, fp32
// sums.
//
// An accumulator (64, N) lies as wgmma and mma.sync both have it: warp w holds rows 16w ... 16w+15;
// lane l holds, of every 8 columns i, acc[4i + 0, 1] = row l/4, columns 2(l%4), +1 and
// acc[4i + 2, 3] = the same of row l/4 + 8. A fragment (16 rows a warp, 16 k) is four registers of
// two elements: (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8) at row l/4, k = 2(l%4).
//
// On sm_90a the products are wgmma and asynchronous: mma_begin(), products, mma_commit(), then
// mma_wait() before the accumulator or the tiles are touched. Elsewhere they are ldmatrix and
// mma.sync, and those three do nothing.
#pragma once

#include "primitives/core_tile.cuh"
#include "primitives/wgmma.cuh"

namespace based::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// ---- fragments ---------------------------------------------------------------------------------

template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// Four 8 x 8 matrices in fragment order to the 16-byte rows whose addresses the lanes give (sm_90).
__device__ __forceinline__ void store_matrix_x4(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(address),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// A = tile[row ... row+15][8 block ... 8 block + 15].
template <class Tile>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const Tile& tile, int row, int block) {
  const int l = threadIdx.x % 32;
  ldmatrix_x4<false>(a, tile.address(row + l % 16, block + l / 16));
}

// A = transpose of tile[k ... k+15][8 block ... 8 block + 15].
template <class Tile>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const Tile& tile, int k,
                                                  int block) {
  const int l = threadIdx.x % 32;
  ldmatrix_x4<true>(a, tile.address(k + l % 8 + l / 16 * 8, block + l / 8 % 2));
}

// B fragments of two neighbouring n-tiles (b[0], b[1] and b[2], b[3]), k = rows of the tile:
// B = tile[k ... k+15][8 block ... 8 block + 15].
template <class Tile>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const Tile& tile, int k, int block) {
  const int l = threadIdx.x % 32;
  ldmatrix_x4<true>(b, tile.address(k + l % 16, block + l / 16));
}

// The same with n = rows of the tile: B = transpose of tile[n ... n+15][8 block ... 8 block + 15].
template <class Tile>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const Tile& tile, int n,
                                                  int block) {
  const int l = threadIdx.x % 32;
  ldmatrix_x4<false>(b, tile.address(n + l % 8 + l / 16 * 8, block + l / 8 % 2));
}

// ---- one warp ----------------------------------------------------------------------------------

// d (16, 8) += A (16, 16) B (16, 8).
template <class Element>
__device__ __forceinline__ void warp_mma(float* d, const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// ---- a warpgroup -------------------------------------------------------------------------------

// Keeps the compiler from moving uses of an accumulator across the instruction before or after.
template <int N>
__device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Both name the accumulators that the products between them add to.
template <class... Accumulators>
__device__ __forceinline__ void mma_begin(Accumulators&... d) {
  if constexpr (kHasWgmma) {
    (pin(d), ...);
    wgmma_fence();
  }
}
__device__ __forceinline__ void mma_commit() {
  if constexpr (kHasWgmma) wgmma_commit();
}
template <int kPending, class... Accumulators>
__device__ __forceinline__ void mma_wait(Accumulators&... d) {
  if constexpr (kHasWgmma) {
    wgmma_wait<kPending>();
    (pin(d), ...);
  }
}

// Makes this thread's ordinary writes to shared memory visible to wgmma; a barrier must follow.
__device__ __forceinline__ void mma_publish() {
  if constexpr (kHasWgmma) asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// The operand at tile[row ...][8 block ...], as the tile's own plus an offset, which is mostly a
// constant.
template <int kAlongK, int kAlongMn, class Tile>
__device__ __forceinline__ uint64_t wgmma_tile(const Tile& tile, int row, int block) {
  return wgmma_descriptor(tile.address(0, 0), kAlongK, kAlongMn) +
         uint32_t(block * Tile::kColStride + row * 16) / 16;
}

// d (64, N) (+)= A (64, 16) tile[k ... k+15][8 block ... 8 block + N-1].
// kAsync false takes mma.sync everywhere, for branches that wgmma cannot stand in.
template <class Element, int N, bool kAsync = kHasWgmma, class Tile>
__device__ __forceinline__ void mma_AB(float (&d)[N / 2], const uint32_t (&a)[4], const Tile& tile,
                                       int k, int block, bool accumulate = true) {
  if constexpr (kAsync) {
    wgmma_rs<Element, N, true>(d, a, wgmma_tile<Tile::kRowStride, Tile::kColStride>(tile, k, block),
                               accumulate);
  } else {
    if (!accumulate) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) d[i] = 0;
    }
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      uint32_t b[4];
      const int last = n + 1 < N / 8 ? n : n - 1;  // an odd last n-tile rides on the one before
      load_b(b, tile, k, block + last);
      if (n == last) warp_mma<Element>(d + 4 * n, a, b[0], b[1]);
      if (n == last) warp_mma<Element>(d + 4 * n + 4, a, b[2], b[3]);
      if (n != last) warp_mma<Element>(d + 4 * n, a, b[2], b[3]);
    }
  }
}

// d (64, N) (+)= A (64, 16) times the transpose of tile[row ... row+N-1][8 block ... 8 block + 15].
template <class Element, int N, bool kAsync = kHasWgmma, class Tile>
__device__ __forceinline__ void mma_ABt(float (&d)[N / 2], const uint32_t (&a)[4], const Tile& tile,
                                        int row, int block, bool accumulate = true) {
  if constexpr (kAsync) {
    wgmma_rs<Element, N, false>(
        d, a, wgmma_tile<Tile::kColStride, Tile::kRowStride>(tile, row, block), accumulate);
  } else {
    if (!accumulate) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) d[i] = 0;
    }
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
      uint32_t b[4];
      const int last = n + 1 < N / 8 ? n : n - 1;
      load_b_transposed(b, tile, row + 8 * last, block);
      if (n == last) warp_mma<Element>(d + 4 * n, a, b[0], b[1]);
      if (n == last) warp_mma<Element>(d + 4 * n + 4, a, b[2], b[3]);
      if (n != last) warp_mma<Element>(d + 4 * n, a, b[2], b[3]);
    }
  }
}

// d (64, N) += transpose of left[l ... l+15][8 m ... 8 m + 63] times right[r ... r+15][8 n ... +
// N-1].
template <class Element, int N, class Left, class Right>
__device__ __forceinline__ void mma_AtB(float (&d)[N / 2], const Left& left, int l, int m,
                                        const Right& right, int r, int n) {
  if constexpr (kHasWgmma) {
    wgmma_ss<Element, N>(d, wgmma_tile<Left::kRowStride, Left::kColStride>(left, l, m),
                         wgmma_tile<Right::kRowStride, Right::kColStride>(right, r, n));
  } else {
    uint32_t a[4];
    load_a_transposed(a, left, l, m + threadIdx.x / 32 % 4 * 2);
    if constexpr (N == 8) {
      uint32_t b[4];
      load_b(b, right, r, n - 1);
      warp_mma<Element>(d, a, b[2], b[3]);
    } else {
      mma_AB<Element, N>(d, a, right, r, n);
    }
  }
}

}  // namespace based::cuda
