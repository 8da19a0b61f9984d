// Shared memory of the fused backward, two rings of slots with blocks of 64 rows, and the warpgroup
// that fills them (see backward_fused.cuh).
#pragma once

#include "primitives/bulk_copy.cuh"
#include "primitives/mbarrier.cuh"
#include "sliding_window/forward.cuh"
#include "sliding_window/warpgroup.cuh"

namespace based::cuda {

struct FusedLayout {
  int back;                // blocks of keys that a block of queries sees
  int key_slots, q_slots;  // of the two rings
};

// The next block of a ring: its slot, and the parity of the phase in which the slot is filled.
struct Cursor {
  int slot = 0, phase = 0;
  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) slot = 0, phase ^= 1;
  }
};

template <class Tile_>
struct FusedShared {
  using Tile = Tile_;
  // Where registers allow, delta and dq have a warpgroup each.
  static constexpr bool kDeltaGroup = Tile::kV <= 64;
  static constexpr int kComputing = kDeltaGroup ? 3 : 2;  // warpgroups
  static constexpr int kThreads = (kComputing + 1) * 128;

  char* bytes;
  int key_slots, q_slots;

  static constexpr int size(int key_slots, int q_slots) {
    return key_slots * (2 * Tile::kBytes + kGroupRows * 4 + 16) +
           q_slots * (2 * Tile::kBytes + 2 * kGroupRows * 4 + 24);
  }
  __device__ __forceinline__ Tile k(int slot) const { return {bytes + 2 * slot * Tile::kBytes}; }
  __device__ __forceinline__ Tile v(int slot) const { return {k(slot).bytes + Tile::kBytes}; }
  __device__ __forceinline__ Tile q(int slot) const { return k(key_slots + slot); }
  __device__ __forceinline__ Tile dout(int slot) const { return v(key_slots + slot); }
  __device__ __forceinline__ float* lse(int slot) const {  // in units of log2
    return reinterpret_cast<float*>(k(key_slots + q_slots).bytes) + slot * kGroupRows;
  }
  __device__ __forceinline__ float* delta(int slot) const { return lse(q_slots + slot); }
  __device__ __forceinline__ float* flags(int slot) const { return lse(2 * q_slots + slot); }
  __device__ __forceinline__ Mbarrier& full_k(int slot) const {
    return reinterpret_cast<Mbarrier*>(flags(key_slots))[slot];
  }
  __device__ __forceinline__ Mbarrier& empty_k(int slot) const { return full_k(key_slots + slot); }
  __device__ __forceinline__ Mbarrier& full_q(int slot) const {
    return full_k(2 * key_slots + slot);
  }
  __device__ __forceinline__ Mbarrier& empty_q(int slot) const { return full_q(q_slots + slot); }
  __device__ __forceinline__ Mbarrier& ready(int slot) const { return full_q(2 * q_slots + slot); }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < key_slots; ++i) full_k(i).init(64), empty_k(i).init(128 * kComputing);
    for (int i = 0; i < q_slots; ++i) {
      full_q(i).init(64), empty_q(i).init(128 * kComputing), ready(i).init(128);
    }
  }
};

// tile <- rows first ... first + 63, 0 beyond `length` and head_dim. By two warps.
template <class Tile>
__device__ __forceinline__ void load_group(const Tile& tile,
                                           const RowSource<typename Tile::Element>& source,
                                           int first, int length, int head_dim) {
  // Eight lanes take a row's chunks of a part, the two warps eight rows.
  const int chunk = threadIdx.x % 8, row = threadIdx.x % 64 / 8;
  const uint32_t to = shared_address(tile.bytes) + row * 128 + (chunk ^ row) * 16;
#pragma unroll
  for (int i = 0; i < kGroupRows / 8; ++i) {
    const int s = first + 8 * i + row;
    const auto* from = source.tokens + (s < length ? s : 0) * source.token_stride + 8 * chunk;
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      const int column = 64 * part + 8 * chunk;
      if (Tile::kV % 64 == 0 || column < Tile::kV) {
        cp_async_16(to + part * Tile::kPartBytes + i * 1024, from + 64 * part,
                    s < length && column < head_dim);
      }
    }
  }
}

// Whether row threadIdx.x % 64 of the tile was finite; what was not is 0 afterwards.
template <class Tile>
__device__ __forceinline__ bool cleanse_row(const Tile& tile) {
  bool finite = true;
#pragma unroll 1
  for (int c = 0; c < Tile::kV; ++c) {
    typename Tile::Element& x = tile.at(threadIdx.x % 64, c);
    if (fabsf(to_float(x)) <= FLT_MAX) continue;
    x = from_float<typename Tile::Element>(0.0f);
    finite = false;
  }
  return finite;
}

__device__ __forceinline__ void pair_barrier(int id) {  // of two warps
  asm volatile("barrier.sync %0, 64;\n" ::"r"(id) : "memory");
}

// What one CTA does, in blocks of 64 rows of its sequence.
struct FusedRange {
  int first, last;          // blocks that it owns
  int key_first, all_last;  // blocks of keys and queries that it loads
};

template <class Tile>
__device__ __forceinline__ void load_keys(const FusedShared<Tile>& shared, const FusedRange& range,
                                          const RowSource<typename Tile::Element>& k,
                                          const RowSource<typename Tile::Element>& v, int length,
                                          int head_dim, bool checked, Cursor& at) {
#pragma unroll 1
  for (int block = range.key_first; block < range.all_last; ++block) {
    const int slot = at.slot, first = block * kGroupRows;
    shared.empty_k(slot).wait(at.phase ^ 1);
    load_group(shared.k(slot), k, first, length, head_dim);
    load_group(shared.v(slot), v, first, length, head_dim);
    cp_async_commit();
    cp_async_wait<0>();
    if (checked) {
      pair_barrier(1);
      shared.flags(slot)[threadIdx.x % 64] = cleanse_row(shared.k(slot)) ? 0.0f : not_a_number();
    }
    fence_proxy_async();
    shared.full_k(slot).arrive();
    at.advance(shared.key_slots);
  }
}

template <class Tile>
__device__ __forceinline__ void load_queries(const FusedShared<Tile>& shared,
                                             const FusedRange& range,
                                             const RowSource<typename Tile::Element>& q,
                                             const RowSource<typename Tile::Element>& dout,
                                             const RowSource<float>& lse, int length, int head_dim,
                                             bool checked, Cursor& at) {
#pragma unroll 1
  for (int block = range.first; block < range.all_last; ++block) {
    const int slot = at.slot, first = block * kGroupRows, t = first + threadIdx.x % 64;
    float log_sum = t < length ? *lse.row(t) * kLog2E : INFINITY;  // no weight behind the end
    shared.empty_q(slot).wait(at.phase ^ 1);
    load_group(shared.q(slot), q, first, length, head_dim);
    load_group(shared.dout(slot), dout, first, length, head_dim);
    cp_async_commit();
    cp_async_wait<0>();
    if (checked) {
      pair_barrier(2);
      const bool finite = cleanse_row(shared.q(slot)) & cleanse_row(shared.dout(slot));
      if (!finite) log_sum = not_a_number();
    }
    shared.lse(slot)[threadIdx.x % 64] = log_sum;
    fence_proxy_async();
    shared.full_q(slot).arrive();
    at.advance(shared.q_slots);
  }
}

}  // namespace based::cuda
