// What the launchers of the forward and the backward share: the layout of a call, the choice of a
// kernel by dtype and head_dim, and the size of its CTAs.
#pragma once

#include <algorithm>
#include <limits>

#include "based/ops.h"
#include "primitives/dispatch.h"
#include "sliding_window/geometry.cuh"
#include "sliding_window/traits.h"
#include "validate.h"

namespace based::cuda {

constexpr int kMaxHeadDim = 256;
constexpr int64_t kMaxTokens = int64_t(1) << 30;

// Every row starts at a multiple of 16 bytes and is a multiple of 16 bytes long.
inline bool rows_aligned(const TensorView& view, int element_bytes) {
  if (view.rank < 0) return true;
  const int64_t chunk = 16 / element_bytes;
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  aligned &= view.size[view.rank - 1] % chunk == 0;
  for (int i = 0; i + 1 < view.rank; ++i) {
    aligned &= view.size[i] <= 1 || view.stride[i] % chunk == 0;
  }
  return aligned;
}

inline Status check_limits(const char* op, const SlidingWindowParams& p) {
  if (p.q.size[3] > kMaxHeadDim) {
    return make_status(StatusCode::kUnsupported, "%s: q: expected head_dim <= %d on CUDA, got %lld",
                       op, kMaxHeadDim, static_cast<long long>(p.q.size[3]));
  }
  const int64_t ring = p.initial_k_cache.rank < 0 ? 0 : p.window;
  if (p.q.size[1] + ring > kMaxTokens || p.q.size[2] > kMaxTokens) {
    return make_status(StatusCode::kUnsupported,
                       "%s: q: expected at most 2^30 tokens and cached keys, and heads, got more",
                       op);
  }
  return {};
}

inline WindowLayout window_layout(const SlidingWindowParams& p) {
  WindowLayout l = {};
  l.cu_seqlens = index_vector(p.cu_seqlens), l.positions = index_vector(p.initial_positions);
  l.packed = p.cu_seqlens.rank >= 0;
  l.sequences = l.packed ? p.cu_seqlens.size[0] - 1 : p.q.size[0];
  l.seqlen = static_cast<int>(p.q.size[1]), l.heads = static_cast<int>(p.q.size[2]);
  l.head_dim = static_cast<int>(p.q.size[3]);
  l.ring_size = p.initial_k_cache.rank < 0 ? 0 : static_cast<int>(p.window);
  l.window = static_cast<int>(std::min<int64_t>(p.window, l.seqlen + int64_t(l.ring_size) + 1));
  const int bytes = p.q.dtype == DType::kFloat32 ? 4 : 2;
  l.aligned = true;
  for (const TensorView* view : {&p.q, &p.k, &p.v, &p.out, &p.initial_k_cache, &p.initial_v_cache,
                                 &p.final_k_cache, &p.final_v_cache}) {
    l.aligned &= rows_aligned(*view, bytes);
  }
  return l;
}

// Cuts the tokens into tiles of so many rows; returns how many tiles there are.
inline int64_t cut_into_tiles(WindowLayout& l, int rows) {
  l.rows = rows;
  l.tiles_of_each = (l.seqlen + rows - 1) / rows;
  return l.packed ? l.seqlen / rows + l.sequences + 1 : l.sequences * l.tiles_of_each;
}

// fn(Type<Tile>{}) for the narrowest tile that holds head_dim.
template <template <class, int> class Tile, class Fn>
Status dispatch_tile(const char* op, const TensorView& q, const Fn& fn) {
  const int64_t V = q.size[3];
  return dispatch_element(op, q.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    if (V <= 64) return fn(Type<Tile<Element, 64>>{});
    if constexpr (sizeof(Element) == 2) {
      if (V <= 112) return fn(Type<Tile<Element, 112>>{});
    }
    if (V <= 128) return fn(Type<Tile<Element, 128>>{});
    return fn(Type<Tile<Element, kMaxHeadDim>>{});
  });
}

inline Status too_large(const char* op) {
  return make_status(StatusCode::kUnsupported,
                     "%s: q: expected fewer than 2^31 tiles of work, got more", op);
}

constexpr int64_t kMaxBlocks = std::numeric_limits<int32_t>::max();

// Computing warps of a CTA: as tuned, or as many as this GPU has shared memory for. 0 after an
// error.
template <class Traits, class Kernel>
int prepare(Kernel kernel) {
  int device = 0, limit = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess) {
    return 0;
  }
  int warps = Traits::kTuning.warps;
  while (warps > 1 && Traits::shared_bytes(warps) > limit) --warps;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Traits::shared_bytes(warps));
  return error == cudaSuccess ? warps : 0;
}

}  // namespace based::cuda
