// Parts of the kernels whose warpgroups have roles (sm_90a, feature_dim up to 16): chunks of 64
// tokens, which pass through a ring of stages, and z as moments.
#pragma once

#include "linear_attention/chunk.cuh"
#include "primitives/mbarrier.cuh"

namespace based::cuda::linear {

constexpr int kSpan = 64;  // tokens of a chunk here: one warpgroup's rows
constexpr int kGroupThreads = 128;

template <class Tr>
using SpanTokens = CoreTile<kSpan, Tr::kD>;
using SpanValues = CoreTile<kSpan, kExtended>;
template <class Tr>
using SpanPhi = CoreTile<kSpan, Tr::kF>;

// A barrier of one warpgroup.
__device__ __forceinline__ void group_sync(int id) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "n"(kGroupThreads) : "memory");
}

// Of four warpgroups that start with 128 registers a thread, one takes more, or leaves some to the
// others.
template <int kRegisters>
__device__ __forceinline__ void set_registers() {
  if constexpr (kRegisters > 128) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
  }
}

// Parity of the use-th use of a ring's place.
__device__ __forceinline__ int parity(int use) { return use & 1; }

// Tokens that the state holds at the end of a segment's first chunk of kSpan.
__device__ __forceinline__ float tokens_through_span(const Arguments& a, const Segment& seg,
                                                     int head) {
  float initial = 0;
  if (a.initial.kv != nullptr) {
    initial = fabsf(a.initial.k[seg.sequence * a.initial.k_sequence + head * a.initial.k_head]);
  }
  return initial + float(seg.before + kSpan);
}

// threadIdx.x, read once: the compiler would rather read the slow register again and again.
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// Copies chunk after chunk of a head's rows, 16 bytes a thread and pass, into tiles of kSpan rows,
// by one warpgroup, which takes every kTurns-th chunk of a segment, forward or (negative) backward.
// Asynchronously, or through registers: cp.async takes a cycle of the memory pipe for each 16
// bytes, since neighbours of a row do not lie side by side in a tile; ordinary loads and stores
// take a fourth.
template <class Element, int kBlocks>
struct SpanLoader {
  static constexpr int kStep = kGroupThreads / kBlocks;  // rows a pass
  static constexpr int kPasses = kStep < kSpan ? kSpan / kStep : 1;
  const Element* at;  // the thread's first row of the next chunk

  __device__ SpanLoader(int thread, const Rows& rows, const Segment& seg, int head,
                        int first_column, int chunk)
      : at(rows.at<Element>(seg.batch, seg.begin + chunk * kSpan + thread / kBlocks, head) +
           first_column + 8 * (thread % kBlocks)) {}

  // n rows and `valid` of the kBlocks exist; the others are zeros.
  template <int kTurns, class Tile>
  __device__ __forceinline__ void load(int thread, Tile& tile, int64_t stride, int n,
                                       int valid = kBlocks) {
    const int row = thread / kBlocks, block = thread % kBlocks;
    const uint32_t to = tile.address(row, block);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (kStep > kSpan && row >= kSpan) continue;
      cp_async_16(to + pass * kStep * 16, at + pass * kStep * stride,
                  block < valid && row + pass * kStep < n);
    }
    at += kTurns * kSpan * stride;
  }

  template <int kTurns>
  __device__ __forceinline__ void fetch(int thread, uint4 (&held)[kPasses], int64_t stride, int n,
                                        int valid = kBlocks) {
    const int row = thread / kBlocks, block = thread % kBlocks;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      held[pass] = make_uint4(0, 0, 0, 0);
      if (row < kSpan && block < valid && row + pass * kStep < n) {
        held[pass] = *reinterpret_cast<const uint4*>(at + pass * kStep * stride);
      }
    }
    at += kTurns * kSpan * stride;
  }

  template <class Tile>
  __device__ __forceinline__ static void put(int thread, const uint4 (&held)[kPasses], Tile& tile) {
    const int row = thread / kBlocks, block = thread % kBlocks;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      if (kStep > kSpan && row >= kSpan) continue;
      *reinterpret_cast<uint4*>(tile.at(row + pass * kStep, block)) = held[pass];
    }
  }
};

// Stores a warpgroup's (kSpan, kTileV) of 16-bit results, chunk after chunk as SpanLoader loads
// them.
template <class Element>
struct SpanStore {
  using Tile = CoreTile<kSpan, kTileV>;
  Element* at;  // the lane's first 16 bytes of the next chunk; the others lie 4 rows apart

  __device__ SpanStore(int thread, const Rows& rows, const Segment& seg, int head, int first_column,
                       int chunk)
      : at(rows.at<Element>(seg.batch, seg.begin + chunk * kSpan + row_of(thread), head) +
           first_column + thread % 8 * 8) {}

  __device__ __forceinline__ static int row_of(int thread) {
    return thread / 32 * 16 + thread % 32 / 8;
  }

  // words: an accumulator's pairs, packed, of which n rows and `valid` times 8 columns exist.
  template <int kTurns>
  __device__ __forceinline__ void store(int thread, const uint32_t (&words)[kTileV / 4], Tile& tile,
                                        int64_t stride, int n, int valid) {
    const uint32_t to = tile.address(thread / 32 * 16 + thread % 16, thread % 32 / 16);
    __syncwarp();
#pragma unroll
    for (int b = 0; b < kTileV / 8; b += 2) {
      const uint32_t four[4] = {words[2 * b], words[2 * b + 1], words[2 * b + 2], words[2 * b + 3]};
      store_matrix_x4(to + b * Tile::kColStride, four);
    }
    __syncwarp();
    const int row = row_of(thread), block = thread % 8;
    uint4 rows[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rows[i] = *reinterpret_cast<const uint4*>(tile.at(row + 4 * i, block));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (block < valid && row + 4 * i < n) {
        *reinterpret_cast<uint4*>(at + 4 * i * stride) = rows[i];
      }
    }
    at += kTurns * kSpan * stride;
  }
};

// A warp's 16 queries as A fragments, and phi of them. Rotations come from a transposed copy in
// shared memory (a row a feature, two halves of 8 tokens), whose first rows stand again behind the
// last, so that every rotation is 16 rows in sequence, or, for D = 8, twice 8.
template <class Tr>
struct Queries {
  using Element = typename Tr::Element;
  static constexpr int kRepeated = 8, kHalfBytes = (Tr::D + kRepeated) * 16;
  static constexpr int kSecond = Tr::D == 16 ? 8 : 1;  // rows from a step's first group to the next
  uint32_t x[1][4];
  uint32_t to, from;  // of the lane in the transposed copy

  __device__ Queries(int lane, char* sTransposed) {
    to = shared_address(sTransposed) + lane / 4 * 16 + lane % 4 * 4;
    from = shared_address(sTransposed) + lane / 8 % 2 * kHalfBytes +
           (lane / 16 * kSecond + lane % 8) * 16;
  }

  __device__ __forceinline__ void transpose() {
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      if (8 * (r / 2) >= Tr::D) continue;
      uint32_t moved;
      asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(moved) : "r"(x[0][r]));
      const uint32_t address = to + r % 2 * kHalfBytes + r / 2 * 128;
      asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address), "r"(moved) : "memory");
      if (r < 2) {
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(address + Tr::D * 16), "r"(moved)
                     : "memory");
      }
    }
    __syncwarp();
  }

  // As TokenRows has them.
  template <int kStep>
  __device__ __forceinline__ void rotated(uint32_t (&a)[4]) const {
    constexpr Group low = feature_group<Tr::D>(2 * kStep);
    ldmatrix_x4<true>(a, from + (low.j + low.rotation) * 16);
  }
  __host__ __device__ static constexpr bool turns(int step) { return TokenRows<Tr>::turns(step); }

  // phi of all features, step by step 16 of them.
  __device__ __forceinline__ void features(int lane, uint32_t (&phi)[Tr::kF / 16][4]) const {
    static_for<0, Tr::kF / 16>([&](auto step) {
      if constexpr (turns(decltype(step)::value)) {
        rotated<decltype(step)::value>(phi[decltype(step)::value]);
      }
    });
    static_for<0, Tr::kF / 16>([&](auto step) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Group group = feature_group<Tr::D>(2 * decltype(step)::value + r / 2);
        const uint32_t own = x[0][group.j / 8 * 2 + r % 2];
        uint32_t& f = phi[decltype(step)::value][r];
        if (group.rotation == 0) f = own;
        if (group.kind == GroupKind::kLinear) continue;
        if (group.kind == GroupKind::kZero) f = 0;
        if (group.kind == GroupKind::kConstant) f = lane % 4 == 0 ? one<Element>() : 0;
        if (group.kind == GroupKind::kProduct) f = multiply<Element>(own, f);
        if (group.kind == GroupKind::kMixed) {
          f = lane % 4 < 2 ? multiply<Element>(own, f) : lane % 4 == 2 ? one<Element>() : 0;
        }
      }
    });
  }
};

// z = sum_t phi(k_t) of a warpgroup from the moments sum k k^T and sum k: warp w holds columns
// 8w ... 8w+7 of sum k k^T, the warp behind them sum k in its first column. Its products are exact,
// where S sums those that were rounded to 16 bits.
template <class Tr>
struct Moments {
  static constexpr int kSumWarp = Tr::D / 8;
  float sum[4] = {};
  int feature[4];  // whose sum that is, -1: nobody's
  int warp;        // of the warpgroup, the same throughout a warp

  __device__ __forceinline__ explicit Moments(int thread)
      : warp(__shfl_sync(0xffffffffu, thread / 32, 0)) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = thread % 32 / 4 + e / 2 * 8, column = thread % 4 * 2 + e % 2;
      const int rotation = (8 * warp + column - i + 2 * Tr::D) % Tr::D;
      feature[e] = -1;
      if (i >= Tr::D || warp > kSumWarp) continue;
      if (warp == kSumWarp) {
        if (column == 0) feature[e] = i;
      } else if (2 * rotation < Tr::D || (2 * rotation == Tr::D && 2 * i < Tr::D)) {
        feature[e] = (rotation + 1) * Tr::D + i;
      }
    }
  }

  // The rows of sOnes (kSpan, .) have a one in column 8 `ones`, zeros in the seven behind it.
  template <class KTile, class OnesTile>
  __device__ __forceinline__ void update(int lane, const KTile& sK, const OnesTile& sOnes,
                                         int ones) {
    if (warp > kSumWarp) return;
    const uint32_t from = sK.address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t to =
        (warp == kSumWarp ? sOnes.address(0, ones) : sK.address(0, warp)) + lane * 16;
    uint32_t a[kSpan / 16][4], b[kSpan / 32][4];
#pragma unroll
    for (int k = 0; k < kSpan / 16; ++k) {
      if (k % 2 == 0) ldmatrix_x4<true>(b[k / 2], to + k * 256);
      ldmatrix_x4<true>(a[k], from + k * 256);
    }
#pragma unroll
    for (int k = 0; k < kSpan / 16; ++k) {
      warp_mma<typename Tr::Element>(sum, a[k], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
    }
  }

  // The same with a weight for each token, whose products with k are operands in two parts.
  template <class KTile>
  __device__ __forceinline__ void update_weighted(int lane, const KTile& sK, const float* sWeight) {
    using Element = typename Tr::Element;
    if (warp > kSumWarp) return;
    const uint32_t from = sK.address(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t to = sK.address(lane, warp % kSumWarp);
    const float sum_column = lane < 4 ? 1.0f : 0.0f;
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < kSpan; k += 16) {
      uint32_t a[4], high[2], low[2];
      if (k % 32 == 0) ldmatrix_x4<true>(words, to + k * 16);
      ldmatrix_x4<true>(a, from + k * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 weight =
            *reinterpret_cast<const float2*>(sWeight + k + 8 * half + lane % 4 * 2);
        float2 x = unpack<Element>(words[k % 32 / 8 + half]);
        if (warp == kSumWarp) x = {sum_column, sum_column};
        x.x *= weight.x, x.y *= weight.y;
        high[half] = pack<Element>(x.x, x.y);
        const float2 rounded = unpack<Element>(high[half]);
        low[half] = pack<Element>(x.x - rounded.x, x.y - rounded.y);
      }
      warp_mma<Element>(sum, a, high[0], high[1]);
      warp_mma<Element>(sum, a, low[0], low[1]);
    }
  }

  // fn(feature, sum&) for each that a lane holds; all but the constant's.
  template <class Fn>
  __device__ __forceinline__ void for_each(const Fn& fn) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (feature[e] >= 0) fn(feature[e], sum[e]);
    }
  }
};

// Rows 0 ... 63 of sState (rows of v, kF) = S^T times the coefficients times `unit`, rounded.
template <class Tr, class StateTile>
__device__ __forceinline__ void publish_state(int thread, StateTile& sState,
                                              const StateSlice<Tr, 1>& state, float scale,
                                              float unit) {
  const uint32_t to = sState.address(thread / 32 * 16 + thread % 16, thread % 32 / 16);
  static_for<0, Tr::kGroups / 2>([&](auto step) {
    uint32_t words[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = 2 * decltype(step)::value + half;
      const float* s = state.sum + 4 * group;
      float c = group < Tr::D / 8   ? scale
                : group < Tr::D / 4 ? 0.5f * scale * scale
                                    : scale * scale;
      if (group == Tr::kConstant / 8) {
        c = feature_coefficient<Tr>(8 * group + thread % 4 * 2, scale);
      }
      words[2 * half] = pack<typename Tr::Element>(s[0] * (c * unit), s[1] * (c * unit));
      words[2 * half + 1] = pack<typename Tr::Element>(s[2] * (c * unit), s[3] * (c * unit));
    }
    store_matrix_x4(to + decltype(step)::value * 2 * StateTile::kColStride, words);
  });
}

}  // namespace based::cuda::linear
