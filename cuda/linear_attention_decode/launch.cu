#include <algorithm>
#include <cmath>
#include <cstdint>

#include "based/ops.h"
#include "linear_attention_decode/fold.cuh"
#include "primitives/device.h"
#include "primitives/dispatch.h"
#include "primitives/vector.cuh"

namespace based::cuda {
namespace {

template <class Params>
void set_state(DecodeArgs& a, const Params& p) {
  a.kv_state = static_cast<float*>(p.kv_state.data);
  a.k_state = static_cast<float*>(p.k_state.data);
  for (int i = 0; i < 3; ++i) a.kv_stride[i] = p.kv_state.stride[i];
  for (int i = 0; i < 2; ++i) a.z_stride[i] = p.k_state.stride[i];
  a.state_indices = index_vector(p.state_indices);
  a.slots = p.kv_state.size[0], a.heads = static_cast<int>(p.kv_state.size[1]);
  a.F = static_cast<int>(p.kv_state.size[2]), a.V = static_cast<int>(p.kv_state.size[3]);
  a.capacity = 1;
  a.root = static_cast<float>(std::sqrt(p.scale)), a.scale = static_cast<float>(p.scale);
}

template <class Params>
void set_pending(DecodeArgs& a, const Params& p) {
  a.pending_k = p.pending_k.data, a.pending_v = p.pending_v.data;
  for (int i = 0; i < 3; ++i) {
    a.pending_k_stride[i] = p.pending_k.stride[i], a.pending_v_stride[i] = p.pending_v.stride[i];
  }
  a.fill = index_vector(p.fill);
  a.capacity = static_cast<int>(std::min<int64_t>(p.pending_k.size[1], INT32_MAX));
}

void set_tokens(DecodeArgs& a, const LinearAttentionDecodeParams& p) {
  a.q = p.q.data, a.k = p.k.data, a.v = p.v.data, a.out = p.out.data;
  for (int i = 0; i < 2; ++i) {
    a.q_stride[i] = p.q.stride[i], a.k_stride[i] = p.k.stride[i];
    a.v_stride[i] = p.v.stride[i], a.out_stride[i] = p.out.stride[i];
  }
  a.D = static_cast<int>(p.q.size[2]);
  a.normalize = p.normalize;
}

// What these kernels do not cover, and validate() lets pass.
Status check_limits(const char* op, const DecodeArgs& a, int64_t blocks) {
  const auto unsupported = [op](const char* what, int64_t got) {
    return make_status(StatusCode::kUnsupported, "%s: %s on CUDA, got %lld", op, what,
                       static_cast<long long>(got));
  };
  static_assert(kDecodeMaxFeatureDim == 64 && kDecodeMaxHeadDim == 1024 &&
                    kDecodeMaxThreads == 256 && kDecodeMaxPending == 64,
                "the numbers in these messages");
  if (blocks > INT32_MAX) return unsupported("q: expected B * H < 2^31", blocks);
  if (a.D > kDecodeMaxFeatureDim) return unsupported("q: expected feature_dim <= 64", a.D);
  if (a.V > kDecodeMaxHeadDim || (a.V % 4 != 0 && a.V > kDecodeMaxThreads)) {
    return unsupported("v: expected head_dim <= 256, or a multiple of 4 up to 1024,", a.V);
  }
  if (a.capacity > kDecodeMaxPending) return unsupported("pending_k: expected C <= 64", a.capacity);
  return {};
}

// A block has as many rows of the state side by side as its threads allow.
void set_shape(DecodeArgs& a, int vec) {
  a.columns = a.V / vec;
  a.groups = std::clamp(kDecodeThreads / a.columns, 1, kDecodeMaxGroups);
  a.tile_rows = std::min(a.F, kDecodeTileBytes / (static_cast<int>(sizeof(float)) * a.V));
  a.tile_count = (a.F + a.tile_rows - 1) / a.tile_rows;
}

template <bool kDeferred>
Status launch(const char* op, const LinearAttentionDecodeParams& p, const TensorView& pending_k,
              const TensorView& pending_v, DecodeArgs a, Stream stream) {
  const int64_t count = p.q.size[0] * p.q.size[1];
  const Status status = check_limits(op, a, count);
  if (!status.ok() || count == 0) return status;
  a.contiguous = p.kv_state.stride[2] == a.V;
  return dispatch_element(op, p.q.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    const auto vectors = [](const TensorView& x) {
      return rows_are_vectors(x, 4, sizeof(Element));
    };
    a.key_vectors = vectors(p.q) && vectors(p.k) && vectors(pending_k);
    const auto run = [&](auto vec, auto aligned) {
      constexpr int kVec = decltype(vec)::value;
      constexpr bool kAligned = decltype(aligned)::value;
      set_shape(a, kVec);
      const int threads = std::max(kDecodeThreads, (a.columns * a.groups + 31) / 32 * 32);
      const int shared = 4 * DecodeShared(a, sizeof(Element), kDeferred).end;
      const auto kernel = linear_attention_decode_kernel<Element, kVec, kAligned, kDeferred>;
      if (!allow_shared(reinterpret_cast<const void*>(kernel), shared)) {
        return make_status(StatusCode::kUnsupported,
                           "%s: pending_v: expected C * head_dim to fit a block's shared memory on "
                           "CUDA, got C = %d, head_dim = %d",
                           op, a.capacity, a.V);
      }
      launch_early<DecodeArgs>(kernel, static_cast<unsigned>(count), threads, shared,
                               static_cast<cudaStream_t>(stream), a);
      return launch_status(op);
    };
    using One = std::integral_constant<int, 1>;
    using Four = std::integral_constant<int, 4>;
    if (a.V % 4 != 0) return run(One{}, std::true_type{});
    const bool aligned =
        rows_are_vectors(p.kv_state, 4, sizeof(float)) && vectors(p.v) && vectors(pending_v);
    return aligned ? run(Four{}, std::true_type{}) : run(Four{}, std::false_type{});
  });
}

}  // namespace

Status linear_attention_decode(const LinearAttentionDecodeParams& p, void*, Stream stream) {
  const Status status = validate(p);
  if (!status.ok()) return status;
  DecodeArgs a{};
  set_state(a, p), set_tokens(a, p);
  return launch<false>("linear_attention_decode", p, TensorView{}, TensorView{}, a, stream);
}

Status linear_attention_decode_deferred(const LinearAttentionDecodeDeferredParams& p, void*,
                                        Stream stream) {
  const Status status = validate(p);
  if (!status.ok()) return status;
  DecodeArgs a{};
  set_state(a, p), set_tokens(a, p), set_pending(a, p);
  return launch<true>("linear_attention_decode_deferred", p, p.pending_k, p.pending_v, a, stream);
}

Status linear_attention_fold(const LinearAttentionFoldParams& p, void*, Stream stream) {
  const char* op = "linear_attention_fold";
  Status status = validate(p);
  if (!status.ok()) return status;
  DecodeArgs a{};
  set_state(a, p), set_pending(a, p);
  a.D = static_cast<int>(p.pending_k.size[3]);
  const int64_t blocks = p.fill.size[0] * p.kv_state.size[1];
  status = check_limits(op, a, blocks);
  if (!status.ok() || blocks == 0) return status;
  return dispatch_element(op, p.pending_k.dtype, [&](auto type) {
    linear_attention_fold_kernel<typename decltype(type)::type>
        <<<static_cast<unsigned>(blocks), kDecodeMaxThreads, sizeof(float) * a.capacity*(a.D + 1),
           static_cast<cudaStream_t>(stream)>>>(a);
    return launch_status(op);
  });
}

}  // namespace based::cuda
