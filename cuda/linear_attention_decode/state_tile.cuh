// What a call of the decode kernels is given, and the way of a head's state through shared memory.
#pragma once

#include "linear_attention_decode/tuning.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cp_async.cuh"
#include "primitives/decode_row.cuh"

namespace based::cuda {

struct DecodeArgs {
  const void *q, *k;            // (B, H, D)
  const void* v;                // (B, H, V)
  void* out;                    // (B, H, V)
  float *kv_state, *k_state;    // (slots, H, F, V), (slots, H, F)
  void *pending_k, *pending_v;  // (slots, C, H, D), (slots, C, H, V)
  int64_t q_stride[2], k_stride[2], v_stride[2], out_stride[2];
  int64_t kv_stride[3], z_stride[2];
  int64_t pending_k_stride[3], pending_v_stride[3];
  IndexVector state_indices, fill;  // (B,)
  int64_t slots;
  int heads, D, F, V, capacity;
  int columns, groups, tile_rows, tile_count;  // of a block
  float root, scale;                           // sqrt(scale), scale
  bool normalize;
  bool contiguous;   // S: rows without gaps
  bool key_vectors;  // q and keys: rows of whole vectors of 4
};

// kVec neighbouring elements of a row of S.
template <int kVec>
struct alignas(4 * kVec) StateVector {
  float x[kVec];
};

// One head's S on its way through shared memory, a tile of whole rows at a time. A thread's own
// elements are those of its columns in the rows group, group + groups, ...
// kAligned: rows are whole vectors. kOnce: what is read leaves L2 first, tokens and writes stay.
template <int kVec, bool kAligned, bool kOnce>
struct StateTile {
  const DecodeArgs& a;
  float* state;   // (F, V)
  float* shared;  // (tile_rows, V)
  CopyBarrier* arrived;
  int group, column;  // of this thread

  __device__ __forceinline__ bool active() const { return group < a.groups && column < a.V; }
  __device__ __forceinline__ bool bulk() const {
    return kHasBulkCopy && kVec == 4 && kAligned && a.contiguous;
  }
  __device__ __forceinline__ int rows(int tile) const {
    return min(a.tile_rows, a.F - tile * a.tile_rows);
  }
  __device__ __forceinline__ float* global(int tile) const {
    return state + int64_t(tile) * a.tile_rows * a.kv_stride[2];
  }

  // By every thread, after a barrier behind the last reads of the tile before.
  __device__ __forceinline__ void fetch(int tile) const {
    if (bulk()) {
      if (threadIdx.x == 0) {
        arrived->copy<kOnce>(shared, global(tile), rows(tile) * a.V * 4);
      }
      return;
    }
    for (int r = group; r < rows(tile) && active(); r += a.groups) {
      const float* source = global(tile) + r * a.kv_stride[2] + column;
      const auto target = static_cast<uint32_t>(__cvta_generic_to_shared(row(r)));
      if constexpr (kVec == 4 && kAligned) {
        cp_async_16(target, source, true);
      } else {
#pragma unroll
        for (int i = 0; i < kVec; ++i) cp_async_4(target + 4 * i, source + i);
      }
    }
    cp_async_commit();
  }

  // Until this thread's own elements of the tile are there.
  __device__ __forceinline__ void wait(int tile) const {
    if (bulk()) {
      arrived->wait(tile % 2);
    } else {
      cp_async_wait<0>();
    }
  }

  __device__ __forceinline__ StateVector<kVec>* row(int r) const {
    return reinterpret_cast<StateVector<kVec>*>(shared + r * a.V + column);
  }

  // To row r of a tile in global memory.
  __device__ __forceinline__ void store(int tile, int r, const StateVector<kVec>& v) const {
    float* target = global(tile) + r * a.kv_stride[2] + column;
    if constexpr (kVec == 4 && kAligned) {
      *reinterpret_cast<float4*>(target) = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) target[i] = v.x[i];
    }
  }
};

}  // namespace based::cuda
