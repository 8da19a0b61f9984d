// Blocks of 64 rows in shared memory as wgmma reads them, and the products of attention on them, by
// a warpgroup. Accumulators lie as in primitives/mma.cuh.
#pragma once

#include "primitives/mma.cuh"
#include "sliding_window/tiles.cuh"

namespace based::cuda {

constexpr int kGroupRows = 64;

// (64, kV) in shared memory: parts of 64 columns, one behind the other, with rows of 128 bytes
// whose 16-byte chunks are permuted: chunk c of row r lies at c xor r mod 8 (wgmma's 128-byte
// swizzle). Starts at a multiple of 1024 bytes.
template <class Element_, int kV_>
struct GroupTile {
  using Element = Element_;
  static constexpr int kV = kV_;
  static constexpr int kPartBytes = kGroupRows * 128, kParts = (kV + 63) / 64;
  static constexpr int kBytes = kParts * kPartBytes;

  char* bytes;

  __device__ __forceinline__ Element& at(int row, int column) const {
    char* part = bytes + column / 64 * kPartBytes + row * 128;
    const int chunk = column / 8 % 8 ^ row % 8;
    return reinterpret_cast<Element*>(part + chunk * 16)[column % 8];
  }

  // For wgmma: 8 rows of 128 bytes are 1024 bytes, swizzle of 128 bytes. Taken from one lane, so
  // that the compiler knows it for uniform.
  __device__ __forceinline__ uint32_t descriptor() const {
    return __shfl_sync(0xffffffff, shared_address(bytes) / 16 + 65536u, 0);
  }
};

// A descriptor's upper half is a constant.
__device__ __forceinline__ uint64_t group_descriptor(uint32_t tile, int offset) {
  return uint64_t(1024 / 16 | 1u << 30) << 32 | (tile + uint32_t(offset) / 16);
}

// s (64, 64) <- A times the transpose of B.
template <class Tile>
__device__ __forceinline__ void group_mma_ABt(float (&s)[32], const Tile& a, const Tile& b) {
  const uint32_t left = a.descriptor(), right = b.descriptor();
#pragma unroll
  for (int k = 0; k < Tile::kV / 16; ++k) {
    const int offset = k / 4 * Tile::kPartBytes + k % 4 * 32;
    wgmma_ss_nt<typename Tile::Element>(s, group_descriptor(left, offset),
                                        group_descriptor(right, offset), k > 0);
  }
}

// (64, kV) sums: columns 0 ... 63 and the rest.
template <int kV>
struct GroupSums {
  static constexpr int kRest = kV - 64;
  float first[32];
  float rest[kRest > 0 ? kRest / 2 : 1];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& x : first) x = 0.0f;
#pragma unroll
    for (float& x : rest) x = 0.0f;
  }

  // fn(the sums (64, kOut) as tiles of 8 columns, kOut, the first column)
  template <class Fn>
  __device__ __forceinline__ void for_each_part(const Fn& fn) {
    fn(reinterpret_cast<float (&)[8][4]>(first), std::integral_constant<int, 64>{}, 0);
    if constexpr (kRest > 0) {
      fn(reinterpret_cast<float (&)[kRest / 8][4]>(rest), std::integral_constant<int, kRest>{}, 64);
    }
  }

  __device__ __forceinline__ bool all_finite() const {
    float sum = 0.0f;
#pragma unroll
    for (float x : first) sum = fmaf(x, 0.0f, sum);
#pragma unroll
    for (float x : rest) sum = fmaf(x, 0.0f, sum);
    return sum == 0.0f;
  }

  __device__ __forceinline__ void begin() { mma_begin(first, rest); }
  template <int kPending>
  __device__ __forceinline__ void wait() {
    mma_wait<kPending>(first, rest);
  }

  // += a (64, 64) times the tile.
  template <class Tile>
  __device__ __forceinline__ void add(const uint32_t (&a)[4][4], const Tile& tile) {
    using Element = typename Tile::Element;
    const uint32_t right = tile.descriptor();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int offset = 16 * k * 128;
      wgmma_rs<Element, 64, true>(first, a[k], group_descriptor(right, offset), true);
      if constexpr (kRest > 0) {
        wgmma_rs<Element, kRest, true>(rest, a[k],
                                       group_descriptor(right, Tile::kPartBytes + offset), true);
      }
    }
  }
};

// (64, 64) sums, rounded, as left operand.
template <class Element>
__device__ __forceinline__ void group_operand(uint32_t (&a)[4][4], const float (&x)[32]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = pack(Element(), x[2 * i], x[2 * i + 1]);
}

// Rows strip ... strip + 15 before `length` of the target <- the warp's sums, row r times factor0
// or, in the lower half, factor1. As in store_strip, two lanes swap halves of two tiles of 8
// columns.
template <class Tile>
__device__ __forceinline__ void store_group(GroupSums<Tile::kV>& sums, float factor0, float factor1,
                                            const RowSource<typename Tile::Element>& target,
                                            int strip, int length, int head_dim) {
  using Element = typename Tile::Element;
  const int l = threadIdx.x % 32;
  const bool odd = l % 2 == 1;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = strip + l / 4 + 8 * r, c = 8 * odd + l % 4 / 2 * 4;
    const int width = row < length ? head_dim - c : 0;  // of the columns from c on
    const float factor = r == 0 ? factor0 : factor1;
    Element* const to = target.tokens + row * target.token_stride + c;
    sums.for_each_part([&](const auto& x, auto columns, int first) {
#pragma unroll
      for (int j = 0; j < decltype(columns)::value / 8; j += 2) {
        const uint32_t a = pack(Element(), x[j][2 * r] * factor, x[j][2 * r + 1] * factor);
        const uint32_t b = pack(Element(), x[j + 1][2 * r] * factor, x[j + 1][2 * r + 1] * factor);
        const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? a : b, 1);
        if (first + 8 * j < width) {
          *reinterpret_cast<uint2*>(to + first + 8 * j) =
              odd ? make_uint2(other, b) : make_uint2(a, other);
        }
      }
    });
  }
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace based::cuda
