#include "sliding_window/backward_keys.cuh"
#include "sliding_window/launch.cuh"

namespace based::cuda {
namespace {

constexpr const char* kOp = "sliding_window_attention_backward";

}  // namespace

// delta (B, T, H), from the kernel of the queries to that of the keys.
int64_t sliding_window_attention_backward_workspace_size(const SlidingWindowBackwardParams& p) {
  return validate(p).ok() ? p.q.size[0] * p.q.size[1] * p.q.size[2] * int64_t(sizeof(float)) : 0;
}

Status sliding_window_attention_backward(const SlidingWindowBackwardParams& p, void* workspace,
                                         Stream stream_) {
  Status status = validate(p);
  if (status.ok()) status = check_limits(kOp, p);
  if (!status.ok()) return status;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  float* const deltas = static_cast<float*>(workspace);
  WindowLayout layout = window_layout(p);
  const int bytes = p.q.dtype == DType::kFloat32 ? 4 : 2;
  for (const TensorView* view :
       {&p.dout, &p.dq, &p.dk, &p.dv, &p.dinitial_k_cache, &p.dinitial_v_cache}) {
    layout.aligned &= rows_aligned(*view, bytes);
  }
  if (launch_fused_backward(p, layout, stream, status)) return status;
  return dispatch_tile<Tile>(kOp, p.q, [&](auto type) {
    using T = typename decltype(type)::type;
    if (layout.heads == 0) return Status();
    const bool has_tokens = p.q.size[0] > 0 && layout.seqlen > 0;
    if (has_tokens) {
      using Traits = WindowTraits<T, WindowPass::kQueries>;
      const auto kernel = sliding_window_bwd_queries_kernel<T>;
      const WindowCut parts = cut<Traits>(kernel, layout);
      if (parts.threads == 0) return launch_status(kOp);
      const int64_t blocks = parts.tiles * layout.heads;
      if (blocks > kMaxBlocks) return too_large(kOp);
      kernel<<<static_cast<unsigned>(blocks), parts.threads, parts.bytes, stream>>>(p, layout,
                                                                                    deltas);
      const Status launched = launch_status(kOp);
      if (!launched.ok()) return launched;
    }
    using Traits = WindowTraits<T, WindowPass::kKeys>;
    const auto kernel = sliding_window_bwd_keys_kernel<T>;
    const WindowCut parts = cut<Traits>(kernel, layout);
    if (parts.threads == 0) return launch_status(kOp);
    const int64_t token_blocks = has_tokens ? parts.tiles * layout.heads : 0;
    const int ring_tiles =
        p.dinitial_k_cache.rank < 0 ? 0 : (layout.ring_size + layout.rows - 1) / layout.rows;
    const int64_t blocks = token_blocks + layout.sequences * ring_tiles * layout.heads;
    if (blocks == 0) return Status();
    if (blocks > kMaxBlocks) return too_large(kOp);
    kernel<<<static_cast<unsigned>(blocks), parts.threads, parts.bytes, stream>>>(
        p, layout, deltas, static_cast<unsigned>(token_blocks), ring_tiles);
    return launch_status(kOp);
  });
}

}  // namespace based::cuda
