#include <type_traits>

#include "based/ops.h"
#include "primitives/dispatch.h"
#include "primitives/vector.cuh"
#include "sliding_window_decode/kernels.cuh"

namespace based::cuda {
namespace {

constexpr const char* kOp = "sliding_window_decode";

WindowDecodeArgs window_decode_args(const SlidingWindowDecodeParams& p) {
  WindowDecodeArgs a{};
  a.q = p.q.data, a.k = p.k.data, a.v = p.v.data, a.out = p.out.data;
  a.k_cache = p.k_cache.data, a.v_cache = p.v_cache.data;
  for (int i = 0; i < 2; ++i) {
    a.q_stride[i] = p.q.stride[i], a.k_stride[i] = p.k.stride[i];
    a.v_stride[i] = p.v.stride[i], a.out_stride[i] = p.out.stride[i];
  }
  for (int i = 0; i < 3; ++i) {
    a.k_cache_stride[i] = p.k_cache.stride[i], a.v_cache_stride[i] = p.v_cache.stride[i];
  }
  if (p.cos.rank >= 0) {
    a.cos = static_cast<const float*>(p.cos.data), a.sin = static_cast<const float*>(p.sin.data);
    a.cos_stride = p.cos.stride[0], a.sin_stride = p.sin.stride[0];
    a.rotary = static_cast<int>(p.cos.size[1]);
  }
  a.state_indices = index_vector(p.state_indices), a.positions = index_vector(p.positions);
  a.slots = p.k_cache.size[0], a.window = static_cast<int>(p.k_cache.size[1]);
  a.heads = static_cast<int>(p.q.size[1]);
  a.V = static_cast<int>(p.q.size[2]), a.scale = static_cast<float>(p.scale);
  return a;
}

// fn(kVec, kChunks, kLanes) as compile-time constants: the fewest lanes that hold a key, as
// 16-byte vectors where the tensors allow it.
template <class Element, class Fn>
Status dispatch_lanes(int head_dim, bool aligned, const Fn& fn) {
  constexpr int kVec = kWindowDecodeVectorBytes / sizeof(Element);
  using std::integral_constant;
  const auto with = [&](auto vec, auto chunks, auto lanes) { return fn(vec, chunks, lanes); };
  constexpr integral_constant<int, kVec> vec{};
  constexpr integral_constant<int, 1> one{};
  if (!aligned) {
    return with(one, integral_constant<int, kWindowDecodeMaxHeadDim / 32>{},
                integral_constant<int, 32>{});
  }
  if (head_dim <= 8 * kVec) return with(vec, one, integral_constant<int, 8>{});
  if (head_dim <= 16 * kVec) return with(vec, one, integral_constant<int, 16>{});
  if (head_dim <= 32 * kVec) return with(vec, one, integral_constant<int, 32>{});
  return with(vec,
              integral_constant<int, (kWindowDecodeMaxHeadDim + 32 * kVec - 1) / (32 * kVec)>{},
              integral_constant<int, 32>{});
}

}  // namespace

Status sliding_window_decode(const SlidingWindowDecodeParams& p, void*, Stream stream) {
  const Status status = validate(p);
  if (!status.ok()) return status;
  const int64_t blocks = p.q.size[0] * p.q.size[1], head_dim = p.q.size[2];
  if (head_dim > kWindowDecodeMaxHeadDim) {
    return make_status(StatusCode::kUnsupported, "%s: q: expected head_dim <= %d on CUDA, got %lld",
                       kOp, kWindowDecodeMaxHeadDim, static_cast<long long>(head_dim));
  }
  if (blocks > INT32_MAX) {
    return make_status(StatusCode::kUnsupported, "%s: q: expected B * H < 2^31, got %lld", kOp,
                       static_cast<long long>(blocks));
  }
  if (p.k_cache.size[1] > (1 << 30)) {
    return make_status(StatusCode::kUnsupported, "%s: k_cache: expected window <= 2^30, got %lld",
                       kOp, static_cast<long long>(p.k_cache.size[1]));
  }
  if (blocks == 0) return status;
  return dispatch_element(kOp, p.q.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    constexpr int kBytes = sizeof(Element), kCount = kWindowDecodeVectorBytes / kBytes;
    const bool aligned = rows_are_vectors(p.v, kCount, kBytes) &&
                         rows_are_vectors(p.k_cache, kCount, kBytes) &&
                         rows_are_vectors(p.v_cache, kCount, kBytes);
    return dispatch_lanes<Element>(
        static_cast<int>(head_dim), aligned, [&](auto vec, auto chunks, auto lanes) {
          const auto kernel =
              sliding_window_decode_kernel<Element, decltype(vec)::value, decltype(chunks)::value,
                                           decltype(lanes)::value>;
          launch_early<WindowDecodeArgs>(kernel, static_cast<unsigned>(blocks),
                                         kWindowDecodeThreads, 0, static_cast<cudaStream_t>(stream),
                                         window_decode_args(p));
          return launch_status(kOp);
        });
  });
}

}  // namespace based::cuda
