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

// How a pass is cut: threads and shared memory of a CTA, tiles of one head. No threads after an
// error.
struct WindowCut {
  int threads, bytes;
  int64_t tiles;
};

// Rows are cut so that the CTAs come out even on this GPU's multiprocessors; a warp takes one strip
// where the stages cannot hold what its next one shares with those of half of its neighbours.
template <class Traits, class Kernel>
WindowCut cut(Kernel kernel, WindowLayout& l) {
  int device = 0, shared = 0, processors = 1;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
          cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return {};
  }
  int warps = Traits::kTuning.warps, stages = Traits::kTuning.stages;
  while (Traits::shared_bytes(warps, stages) > shared &&
         (stages > 2 * Traits::kStep || warps > 1)) {
    stages > 2 * Traits::kStep ? --stages : --warps;
  }
  const int bytes = Traits::shared_bytes(warps, stages);
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
      cudaSuccess) {
    return {};
  }
  l.stages = stages;
  l.per_stage = static_cast<unsigned>(((uint64_t(1) << 32) + stages - 1) / stages);
  const int rows = kBlock * warps;
  const int64_t sequences = std::max<int64_t>(l.sequences, 1);
  const int64_t length = l.packed ? (l.seqlen + sequences - 1) / sequences : l.seqlen;
  const int64_t tiles = std::max<int64_t>((length + rows - 1) / rows, 1);
  const int64_t slots = int64_t(processors) * Traits::kBlocks;
  const bool keeps = stages >= (l.window + 14) / kBlock + 2 + warps / 2;
  int strips = 1;
  double best = 0;
  for (int n = 1; n <= (keeps ? std::min<int64_t>(tiles, 32) : 1); ++n) {
    const int64_t ctas = sequences * l.heads * ((tiles + n - 1) / n);
    const double time = double((ctas + slots - 1) / slots) * (n * rows + l.window + 64);
    if (n == 1 || time < best) best = time, strips = n;
  }
  l.rows = rows * strips;
  l.tiles_of_each = (l.seqlen + l.rows - 1) / l.rows;
  return {32 * (warps + 1), bytes,
          l.packed ? l.seqlen / l.rows + l.sequences + 1 : l.sequences * l.tiles_of_each};
}

// The backward on Hopper (backward_fused.cuh), for 16-bit calls without an initial ring whose rows
// are aligned and whose blocks fit shared memory; false, with nothing launched, for all others.
bool launch_fused_backward(const SlidingWindowBackwardParams& p, WindowLayout layout,
                           cudaStream_t stream, Status& status);

}  // namespace based::cuda
