// Params -> Arguments, the cut into segments, and launches. Shared by forward and backward.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "based/ops.h"
#include "linear_attention/forward.cuh"
#include "linear_attention/increment_roles.cuh"
#include "primitives/device.h"
#include "primitives/dispatch.h"
#include "validate.h"

namespace based::cuda::linear {

inline bool given(const TensorView& view) { return view.rank >= 0; }

inline Rows rows_of(const TensorView& view) {
  return {view.data, view.stride[0], view.stride[1], view.stride[2]};
}

inline State state_of(const TensorView& kv, const TensorView& k) {
  if (!given(kv)) return {};
  return {static_cast<float*>(kv.data),
          static_cast<float*>(k.data),
          kv.stride[0],
          kv.stride[1],
          kv.stride[2],
          k.stride[0],
          k.stride[1]};
}

// fn(integral_constant<D>) for the feature dims that have tensor-core kernels.
template <class Fn>
Status dispatch_feature_dim(const char* op, int64_t feature_dim, const Fn& fn) {
  switch (feature_dim) {
    case 8:
      return fn(std::integral_constant<int, 8>{});
    case 16:
      return fn(std::integral_constant<int, 16>{});
    case 24:
      return fn(std::integral_constant<int, 24>{});
    case 32:
      return fn(std::integral_constant<int, 32>{});
    default:
      return make_status(StatusCode::kUnsupported,
                         "%s: q: expected feature_dim 8, 16, 24 or 32 on CUDA, got %lld", op,
                         static_cast<long long>(feature_dim));
  }
}

// fn(Type<Traits>) for the tensor-core kernels of a 16-bit call.
template <class Fn>
Status dispatch_traits(const char* op, const LinearAttentionParams& p, const Fn& fn) {
  return dispatch_feature_dim(op, p.q.size[3], [&](auto d) {
    constexpr int D = decltype(d)::value;
    return p.q.dtype == DType::kFloat16 ? fn(Type<Traits<__half, D>>{})
                                        : fn(Type<Traits<__nv_bfloat16, D>>{});
  });
}

// What the kernels can run: feature_dim and head_dim, and rows that 16-byte accesses can read.
inline Status check_supported(const char* op, const LinearAttentionParams& p) {
  const Status status = dispatch_feature_dim(op, p.q.size[3], [](auto) { return Status(); });
  if (!status.ok()) return status;
  if (p.v.size[3] % 8 != 0) {
    return make_status(StatusCode::kUnsupported,
                       "%s: v: expected head_dim a multiple of 8 on CUDA, got %lld", op,
                       static_cast<long long>(p.v.size[3]));
  }
  return {};
}

inline Status check_aligned(const char* op, const char* argument, const TensorView& view) {
  constexpr int kElements = 8;  // of 16 bits
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int i = 0; i < 3; ++i)
    aligned = aligned && (view.size[i] <= 1 || view.stride[i] % kElements == 0);
  if (aligned) return {};
  return make_status(
      StatusCode::kUnsupported,
      "%s: %s: expected data and strides in multiples of 16 bytes on CUDA, got others", op,
      argument);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return std::max(count, 1);
}

// Tokens of a segment: the cut that is done first when `slots` CTAs run at once. A sequence in one
// piece needs no sums beforehand; pieces cost `overhead` of their own time for them.
inline int64_t segment_tokens(int64_t tokens, int64_t tasks, int64_t slots, double overhead,
                              int64_t most_segments) {
  const int64_t chunks = std::max<int64_t>(1, (tokens + kChunk - 1) / kChunk);
  double best = 0;
  int64_t best_chunks = chunks;
  for (int64_t segments = 1; segments <= std::min(chunks, most_segments); ++segments) {
    const int64_t length = (chunks + segments - 1) / segments;
    const int64_t ctas = tasks * ((chunks + length - 1) / length);
    const double waves = std::ceil(double(ctas) / double(slots));
    const double cost = waves * (double(length) + 1.5) * (segments > 1 ? 1 + overhead : 1.0) +
                        (segments > 1 ? 4.0 : 0.0);
    if (segments == 1 || cost < best * 0.99) best = cost, best_chunks = length;
  }
  return best_chunks * kChunk;
}

inline void set_segments(Arguments& a, const LinearAttentionParams& p, int64_t slots,
                         double overhead, int64_t most_segments) {
  const int64_t batch = p.q.size[0], seqlen = p.q.size[1];
  a.seqlen = seqlen;
  a.heads = int(p.q.size[2]);
  a.head_dim = int(p.v.size[3]);
  a.tiles = (a.head_dim + kTileV - 1) / kTileV;
  a.cu_seqlens = given(p.cu_seqlens) ? p.cu_seqlens.data : nullptr;
  a.cu_is_int64 = p.cu_seqlens.dtype == DType::kInt64;
  a.cu_stride = p.cu_seqlens.stride[0];
  a.sequences = a.cu_seqlens != nullptr ? p.cu_seqlens.size[0] - 1 : batch;
  const int64_t tasks = a.sequences * a.heads * a.tiles;
  const int64_t tokens = a.cu_seqlens != nullptr && a.sequences > 0
                             ? (seqlen + a.sequences - 1) / a.sequences
                             : seqlen;
  a.segment = segment_tokens(tokens, tasks, slots, overhead, most_segments);
  // Sequences differ: one longer than the mean need not be cut while it is a small part of the
  // work.
  if (a.cu_seqlens != nullptr) {
    const int64_t share = seqlen * a.heads * a.tiles / (4 * slots);
    a.segment = std::max(a.segment, share / kChunk * kChunk);
  }
  a.per_sequence = std::max<int64_t>(1, (seqlen + a.segment - 1) / a.segment);
  a.segments = a.cu_seqlens == nullptr ? a.sequences * a.per_sequence
               : a.sequences == 0      ? 0
                                       : seqlen / a.segment + a.sequences;
  a.borders = a.cu_seqlens == nullptr ? a.sequences * (a.per_sequence - 1)
              : a.sequences == 0      ? 0
                                      : seqlen / a.segment;
  a.scale = float(p.scale);
  a.normalize = p.normalize;
}

inline Status too_large(const char* op) {
  return make_status(StatusCode::kUnsupported,
                     "%s: q: expected fewer than 2^31 blocks of work, got "
                     "more",
                     op);
}

// One launch; `blocks` 0 launches nothing.
template <class... Parameters, class... Values>
Status launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads,
              size_t shared, Stream stream, const Values&... values) {
  if (blocks == 0) return {};
  if (blocks > 0x7fffffff) return too_large(op);
  if (!allow_shared(reinterpret_cast<const void*>(kernel), shared)) {
    return make_status(StatusCode::kUnsupported,
                       "%s: q: expected a feature_dim whose kernel fits the GPU's shared memory, "
                       "got one that needs %zu bytes a block",
                       op, shared);
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(
      values...);
  return launch_status(op);
}

template <class Tr>
constexpr bool kHasRoles = Tr::D <= 16;

template <class Tr>
Status launch_increments(const char* op, const Arguments& a, Stream stream) {
  const int64_t blocks = a.borders * a.heads * a.tiles;
  if constexpr (kHasRoles<Tr>) {
    if (runs_wgmma()) {
      return launch(op, increment_roles_kernel<Tr, false>, blocks, kIncrementThreads,
                    sizeof(IncrementRoleSmem<Tr>), stream, a);
    }
  }
  return launch(op, increment_kernel<Tr>, blocks, kThreads, sizeof(IncrementSmem<Tr>), stream, a);
}

template <class Tr, bool kReverse>
Status launch_scan(const char* op, const Arguments& a, Stream stream) {
  const int quads = int(kStateFloats<Tr> / 4);
  const int64_t states = a.borders * a.heads * a.tiles;
  // As many parts as fill the GPU: with many short sequences, most CTAs have nothing to do.
  const int64_t parts =
      std::clamp<int64_t>(32 * multiprocessors() / states, 1, (quads + 255) / 256);
  return launch(op, scan_kernel<kReverse>, states * parts, 256, 0, stream, a, quads, int(parts));
}

}  // namespace based::cuda::linear
