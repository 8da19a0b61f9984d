// phi of a chunk, raw products: into a tile, where it is the B operand of the state's update, or as
// A fragments in registers, where it reads the state.
#pragma once

#include "linear_attention/common.cuh"

namespace based::cuda::linear {

// for constant(0) ... constant(kCount - 1)
template <int kFirst, int kLast, class Fn>
__device__ __forceinline__ void static_for(const Fn& fn) {
  if constexpr (kFirst < kLast) {
    fn(std::integral_constant<int, kFirst>{});
    static_for<kFirst + 1, kLast>(fn);
  }
}

// sPhi (., kF) = phi of as many rows of sX (., D) from `first` on, by kWorkers threads, of which
// some share a token: each computes a range of groups, 8 features and one 16-byte store at a time.
template <class Tr, int kWorkers = kThreads, class PhiTile, class XTile>
__device__ __forceinline__ void store_features(PhiTile& sPhi, const XTile& sX, int first,
                                               int thread = threadIdx.x) {
  using Element = typename Tr::Element;
  constexpr int D = Tr::D, kTokens = PhiTile::kRows, kParts = kWorkers / kTokens, kPairs = D / 2;
  static_assert(kWorkers % kTokens == 0 && Tr::kGroups % kParts == 0);
  const int token = thread % kTokens, part = thread / kTokens;
  uint32_t even[kPairs], odd[kPairs];  // (x_2m, x_2m+1) and (x_2m+1, x_2m+2)
#pragma unroll
  for (int block = 0; block < D / 8; ++block) {
    const uint4 x = *reinterpret_cast<const uint4*>(sX.at(first + token, block));
    even[4 * block] = x.x, even[4 * block + 1] = x.y;
    even[4 * block + 2] = x.z, even[4 * block + 3] = x.w;
  }
#pragma unroll
  for (int m = 0; m < kPairs; ++m) odd[m] = __byte_perm(even[m], even[(m + 1) % kPairs], 0x5432);

  const auto pair = [&](auto g, int m) -> uint32_t {  // features 2m, 2m+1 of group g
    constexpr Group group = feature_group<D>(decltype(g)::value);
    constexpr int j = group.j / 2, r = group.rotation;
    if constexpr (group.kind == GroupKind::kLinear) return even[j + m];
    if constexpr (group.kind == GroupKind::kZero) return 0;
    if constexpr (group.kind == GroupKind::kConstant) return m == 0 ? one<Element>() : 0;
    if (group.kind == GroupKind::kMixed && m >= 2) return m == 2 ? one<Element>() : 0;
    const uint32_t other =
        r % 2 == 0 ? even[(j + m + r / 2) % kPairs] : odd[(j + m + r / 2) % kPairs];
    return multiply<Element>(even[(j + m) % kPairs], other);
  };
  static_for<0, kParts>([&](auto p) {
    if (part != decltype(p)::value) return;
    constexpr int kFirst = decltype(p)::value * Tr::kGroups / kParts;
    static_for<kFirst, kFirst + Tr::kGroups / kParts>([&](auto g) {
      *reinterpret_cast<uint4*>(sPhi.at(token, decltype(g)::value)) =
          make_uint4(pair(g, 0), pair(g, 1), pair(g, 2), pair(g, 3));
    });
  });
}

// A warp's 16 tokens of q or k: as A fragments, and transposed in shared memory, from where
// ldmatrix gives every rotation (features are rows there, and rows may be read in any order).
template <class Tr>
struct TokenRows {
  using Element = typename Tr::Element;
  static constexpr int kTransposedBytes =
      2 * Tr::D * 16;  // two halves of 8 tokens, a row a feature
  uint32_t x[Tr::kD / 16][4];
  uint32_t transposed;  // shared address

  template <class Tile>
  __device__ __forceinline__ void load(const Tile& tile, int row, char* sTransposed) {
    const int lane = threadIdx.x % 32;
    transposed = shared_address(sTransposed);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Tr::kD / 16; ++i) {
      load_a(x[i], tile, row, 2 * i);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int block = 2 * i + r / 2;
        if (block >= Tr::D / 8) continue;
        uint32_t moved;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n"
                     : "=r"(moved)
                     : "r"(x[i][r]));
        *reinterpret_cast<uint32_t*>(sTransposed + r % 2 * (Tr::D * 16) +
                                     (8 * block + lane / 4) * 16 + lane % 4 * 4) = moved;
      }
    }
    __syncwarp();
  }

  // x_{j + rotation} where a fragment of the groups 2 kStep, 2 kStep + 1 has x_j.
  template <int kStep>
  __device__ __forceinline__ void rotated(uint32_t (&a)[4]) const {
    constexpr Group low = feature_group<Tr::D>(2 * kStep),
                    high = feature_group<Tr::D>(2 * kStep + 1);
    const int lane = threadIdx.x % 32;
    int feature = (lane < 16 ? low.j + low.rotation : high.j + high.rotation) + lane % 8;
    if (feature >= Tr::D) feature -= Tr::D;
    ldmatrix_x4<true>(a, transposed + lane / 8 % 2 * (Tr::D * 16) + feature * 16);
  }

  // Whether any feature of the step is a product with a rotation.
  __host__ __device__ static constexpr bool turns(int step) {
    return feature_group<Tr::D>(2 * step).rotation > 0 ||
           feature_group<Tr::D>(2 * step + 1).rotation > 0;
  }

  // The A fragment of features 16 kStep ... 16 kStep + 15.
  template <int kStep>
  __device__ __forceinline__ void features(uint32_t (&a)[4]) const {
    const int c = threadIdx.x % 4;
    uint32_t turned[4] = {};
    if constexpr (turns(kStep)) rotated<kStep>(turned);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Group group = feature_group<Tr::D>(2 * kStep + half);
      const uint32_t constant = one<Element>();
#pragma unroll
      for (int r = 2 * half; r < 2 * half + 2; ++r) {
        const uint32_t own = x[group.j / 16][group.j / 8 % 2 * 2 + r % 2];
        const uint32_t other = group.rotation == 0 ? own : turned[r];
        if (group.kind == GroupKind::kLinear) a[r] = own;
        if (group.kind == GroupKind::kProduct) a[r] = multiply<Element>(own, other);
        if (group.kind == GroupKind::kConstant) a[r] = c == 0 ? constant : 0;
        if (group.kind == GroupKind::kZero) a[r] = 0;
        if (group.kind == GroupKind::kMixed) {
          a[r] = c < 2 ? multiply<Element>(own, other) : c == 2 ? constant : 0;
        }
      }
    }
  }
};

}  // namespace based::cuda::linear
