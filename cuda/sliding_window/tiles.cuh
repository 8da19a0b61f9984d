// Row-major tiles in shared memory and the two products of attention on them, by one warp.
//
// A warp owns 16 rows. Everything it holds lies as mma.sync has its accumulators: lane l holds of
// every 8 columns j the elements [j][0, 1] of row l/4, columns 2(l%4), +1, and [j][2, 3] of row
// l/4 + 8. 16-bit elements meet in the tensor cores; float is multiplied in float (no TF32), in
// the same layout.
#pragma once

#include <cfloat>
#include <type_traits>

#include "primitives/cp_async.cuh"
#include "primitives/element.cuh"
#include "primitives/mma.cuh"
#include "sliding_window/geometry.cuh"
#include "sliding_window/traits.h"

namespace based::cuda {

// (rows, kV) in shared memory. The padding makes a row an odd number of 16-byte chunks, so that
// eight rows at the same column lie in different banks.
template <class Element_, int kV_>
struct Tile {
  using Element = Element_;
  static constexpr int kV = kV_;
  static constexpr int kChunk = 16 / sizeof(Element);  // elements of a 16-byte access
  static constexpr int kChunks = kV / kChunk;
  static constexpr int kLd = kV + kChunk;
  static_assert(kV % 16 == 0 && (kChunks + 1) % 2 == 1);
};

// sX (16, kV) <- the rows s0 ... of the source, 0 outside [lower, upper] and beyond head_dim. By
// one warp; asynchronous where rows are aligned.
template <class T>
__device__ __forceinline__ void load_block(typename T::Element* sX,
                                           const RowSource<typename T::Element>& shared_source,
                                           int s0, int lower, int upper, int head_dim,
                                           bool aligned) {
  using Element = typename T::Element;
  // Lanes side by side take kLanes chunks of a row, and kRows rows.
  constexpr int kLanes = T::kChunks < 32 ? T::kChunks : 32, kRows = 32 / kLanes;
  const RowSource<Element> source = shared_source;
  const int l = threadIdx.x % 32, r0 = l / kLanes;
  if (r0 >= kRows) return;
  if (aligned && s0 >= max(lower, 0) &&
      s0 + kBlock - 1 <= upper) {  // nothing to look at on the way
#pragma unroll
    for (int c = l % kLanes * T::kChunk; c < T::kV; c += kLanes * T::kChunk) {
      const Element* from = source.tokens + (s0 + r0) * source.token_stride + c;
      uint32_t to = shared_address(sX + r0 * T::kLd + c);
#pragma unroll
      for (int r = 0; r < kBlock; r += kRows) {
        cp_async_16(to, from, c < head_dim);
        from += kRows * source.token_stride;
        to += kRows * T::kLd * int(sizeof(Element));
      }
    }
    return;
  }
#pragma unroll 1
  for (int r = r0; r < kBlock; r += kRows) {
    const int s = s0 + r;
    const bool inside = s >= lower && s <= upper;
    const Element* from = inside ? source.row(s) : source.tokens;
#pragma unroll 1
    for (int c = l % kLanes * T::kChunk; c < T::kV; c += kLanes * T::kChunk) {
      Element* to = sX + r * T::kLd + c;
      if (aligned) {
        cp_async_16(shared_address(to), from + c, inside && c < head_dim);
      } else {
        for (int e = c; e < c + T::kChunk; ++e) {
          to[e - c] = inside && e < head_dim ? from[e] : from_float<Element>(0.0f);
        }
      }
    }
  }
}

__device__ __forceinline__ uint32_t pack(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t pack(__half, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
// The rows row0 ... of the target that are `wanted`, columns column ... <- the warp's accumulators,
// row r times factors[r / 8].
template <class T, int kOut, class WantedFn>
__device__ __forceinline__ void store_strip(const float (&x)[kOut / 8][4],
                                            const float (&factors)[2],
                                            const RowSource<typename T::Element>& target, int row0,
                                            int column, int head_dim, bool aligned,
                                            const WantedFn& wanted) {
  using Element = typename T::Element;
  const int l = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + l / 4 + 8 * r;
    const bool write = wanted(row);
    Element* const to = write ? target.row(row) : nullptr;
    const auto value = [&](int j, int i) { return x[j][2 * r + i] * factors[r]; };
    if (!aligned) {
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int c = column + 8 * j + l % 4 * 2 + i;
          if (write && c < head_dim) to[c] = from_float<Element>(value(j, i));
        }
      }
    } else if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j) {
        const int c = column + 8 * j + l % 4 * 2;
        if (write && c < head_dim) {
          *reinterpret_cast<float2*>(to + c) = make_float2(value(j, 0), value(j, 1));
        }
      }
    } else {
      // Two lanes swap halves of two 8-column tiles, so that a row's 32 bytes are written at once.
      const bool odd = l % 2 == 1;
#pragma unroll
      for (int j = 0; j < kOut / 8; j += 2) {
        const uint32_t a = pack(Element(), value(j, 0), value(j, 1));
        const uint32_t b = pack(Element(), value(j + 1, 0), value(j + 1, 1));
        const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? a : b, 1);
        const int c = column + 8 * (j + odd) + l % 4 / 2 * 4;
        if (write && c < head_dim) {
          *reinterpret_cast<uint2*>(to + c) = odd ? make_uint2(other, b) : make_uint2(a, other);
        }
      }
    }
  }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- products ----------------------------------------------------------------------------------

// The 16 rows of a warp as left operand, in registers or read again for every product.
template <class T, bool kInRegisters>
struct RowOperand {
  const typename T::Element* rows;
  uint32_t fragments[kInRegisters ? T::kV / 16 : 1][4];

  __device__ __forceinline__ void load(const typename T::Element* from) {
    rows = from;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < T::kV / 16; ++k) read(fragments[k], k);
    }
  }
  // a <- columns 16k ... 16k + 15
  __device__ __forceinline__ void get(uint32_t (&a)[4], int k) const {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = fragments[k][i];
    } else {
      read(a, k);
    }
  }

 private:
  __device__ __forceinline__ void read(uint32_t (&a)[4], int k) const {
    const int l = threadIdx.x % 32;
    ldmatrix_x4<false>(a, shared_address(rows + l % 16 * T::kLd + 16 * k + l / 16 * 8));
  }
};

// d (16, 8) <- A (16, 16) B (16, 8).
template <class Element>
__device__ __forceinline__ void warp_mma_first(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                               uint32_t b1) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%10,%10,%10,%10};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%10,%10,%10,%10};\n"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
  }
}

// s[b] (16, 16) <- rows (16, kV) times the transpose of the 16 rows from sX[b], for kN blocks.
template <int kN, class T, bool kInRegisters>
__device__ __forceinline__ void mma_ABt(float (&s)[kN][2][4],
                                        const RowOperand<T, kInRegisters>& rows,
                                        const typename T::Element* const (&sX)[kN]) {
  const int l = threadIdx.x % 32;
  if constexpr (std::is_same_v<typename T::Element, float>) {
#pragma unroll
    for (int j = 0; j < 8 * kN; ++j) s[j / 8][j / 4 % 2][j % 4] = 0.0f;
    const float* a = rows.rows + l / 4 * T::kLd;
#pragma unroll 2
    for (int k = 0; k < T::kV; k += 4) {
      const float4 a0 = *reinterpret_cast<const float4*>(a + k);
      const float4 a1 = *reinterpret_cast<const float4*>(a + 8 * T::kLd + k);
#pragma unroll
      for (int j = 0; j < 4 * kN; ++j) {
        const int i = j % 2, row = j / 2 % 2 * 8 + l % 4 * 2 + i;
        float (&x)[4] = s[j / 4][j / 2 % 2];
        const float4 b = *reinterpret_cast<const float4*>(sX[j / 4] + row * T::kLd + k);
        x[i] = fmaf(a0.x, b.x, fmaf(a0.y, b.y, fmaf(a0.z, b.z, fmaf(a0.w, b.w, x[i]))));
        x[2 + i] = fmaf(a1.x, b.x, fmaf(a1.y, b.y, fmaf(a1.z, b.z, fmaf(a1.w, b.w, x[2 + i]))));
      }
    }
  } else {
    uint32_t addresses[kN];
#pragma unroll
    for (int b = 0; b < kN; ++b) {
      addresses[b] = shared_address(sX[b] + (l % 8 + l / 16 * 8) * T::kLd + l / 8 % 2 * 8);
    }
#pragma unroll
    for (int k = 0; k < T::kV / 16; ++k) {
      uint32_t a[4];
      rows.get(a, k);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        uint32_t b[4];
        ldmatrix_x4<false>(b, addresses[n] + 32 * k);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (k == 0) warp_mma_first<typename T::Element>(s[n][j], a, b[2 * j], b[2 * j + 1]);
          if (k > 0) warp_mma<typename T::Element>(s[n][j], a, b[2 * j], b[2 * j + 1]);
        }
      }
    }
  }
}

// (16, 16) weights as the left operand of the next product, rounded to Element.
template <class Element>
struct Weights {
  uint32_t a[4];

  __device__ __forceinline__ Weights(const float (&s0)[4], const float (&s1)[4])
      : a{pack(Element(), s0[0], s0[1]), pack(Element(), s0[2], s0[3]),
          pack(Element(), s1[0], s1[1]), pack(Element(), s1[2], s1[3])} {}

  // sums[0, 1] += the sums of the rounded weights of rows l/4, l/4 + 8: a product with ones.
  __device__ __forceinline__ void add_row_sums(float (&sums)[4]) const {
    const uint32_t ones = pack(Element(), 1.0f, 1.0f);
    warp_mma<Element>(sums, a, ones, ones);
  }
};

template <>
struct Weights<float> {
  float p[2][4];

  __device__ __forceinline__ Weights(const float (&s0)[4], const float (&s1)[4])
      : p{{s0[0], s0[1], s0[2], s0[3]}, {s1[0], s1[1], s1[2], s1[3]}} {}

  __device__ __forceinline__ void add_row_sums(float (&sums)[4]) const {
    sums[0] += quad_sum(p[0][0] + p[0][1] + p[1][0] + p[1][1]);
    sums[2] += quad_sum(p[0][2] + p[0][3] + p[1][2] + p[1][3]);
  }
};

// x (16, kOut) += a (16, 16) times 16 rows and kOut columns of a tile, from sX.
template <class T, int kOut>
__device__ __forceinline__ void mma_AB(const typename T::Element* sX,
                                       const Weights<typename T::Element>& a,
                                       float (&x)[kOut / 8][4]) {
  const int l = threadIdx.x % 32;
  if constexpr (std::is_same_v<typename T::Element, float>) {
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int from = (l & ~3) + k % 8 / 2;
      const float a0 = __shfl_sync(0xffffffff, a.p[k / 8][k % 2], from);
      const float a1 = __shfl_sync(0xffffffff, a.p[k / 8][2 + k % 2], from);
#pragma unroll
      for (int j = 0; j < kOut / 8; ++j) {
        const float2 b = *reinterpret_cast<const float2*>(sX + k * T::kLd + 8 * j + l % 4 * 2);
        x[j][0] = fmaf(a0, b.x, x[j][0]), x[j][1] = fmaf(a0, b.y, x[j][1]);
        x[j][2] = fmaf(a1, b.x, x[j][2]), x[j][3] = fmaf(a1, b.y, x[j][3]);
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kOut / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4<true>(b, shared_address(sX + l % 16 * T::kLd + 8 * j + l / 16 * 8));
      warp_mma<typename T::Element>(x[j], a.a, b[0], b[1]);
      warp_mma<typename T::Element>(x[j + 1], a.a, b[2], b[3]);
    }
  }
}

// The same for two left operands, which share what is read from shared memory.
template <class T, int kOut>
__device__ __forceinline__ void mma_AB(const typename T::Element* sX,
                                       const Weights<typename T::Element>& a,
                                       float (&x)[kOut / 8][4],
                                       const Weights<typename T::Element>& other,
                                       float (&y)[kOut / 8][4]) {
  if constexpr (std::is_same_v<typename T::Element, float>) {
    mma_AB<T, kOut>(sX, a, x);
    mma_AB<T, kOut>(sX, other, y);
  } else {
    const int l = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kOut / 8; j += 2) {
      uint32_t b[4];
      ldmatrix_x4<true>(b, shared_address(sX + l % 16 * T::kLd + 8 * j + l / 16 * 8));
      warp_mma<typename T::Element>(x[j], a.a, b[0], b[1]);
      warp_mma<typename T::Element>(x[j + 1], a.a, b[2], b[3]);
      warp_mma<typename T::Element>(y[j], other.a, b[0], b[1]);
      warp_mma<typename T::Element>(y[j + 1], other.a, b[2], b[3]);
    }
  }
}

}  // namespace based::cuda
