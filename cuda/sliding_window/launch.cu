#include "sliding_window/forward.cuh"
#include "sliding_window/launch.cuh"

namespace based::cuda {
namespace {

constexpr const char* kOp = "sliding_window_attention";

template <class Element>
Status write_final_ring(const SlidingWindowParams& p, const WindowLayout& layout,
                        cudaStream_t stream) {
  constexpr int kThreads = 256, kChunk = 16 / sizeof(Element);
  const int64_t chunks = (layout.head_dim + kChunk - 1) / kChunk;
  const int64_t count = layout.sequences * p.window * layout.heads * chunks;
  const int64_t blocks = (std::max(count, layout.sequences) + kThreads - 1) / kThreads;
  if (blocks == 0) return {};
  if (blocks > kMaxBlocks) return too_large(kOp);
  sliding_window_ring_kernel<Element>
      <<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, layout, count);
  return launch_status(kOp);
}

}  // namespace

Status sliding_window_attention(const SlidingWindowParams& p, void*, Stream stream_) {
  Status status = validate(p);
  if (status.ok()) status = check_limits(kOp, p);
  if (!status.ok()) return status;
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  WindowLayout layout = window_layout(p);
  return dispatch_tile<Tile>(kOp, p.q, [&](auto type) {
    using T = typename decltype(type)::type;
    using Traits = WindowTraits<T, WindowPass::kForward>;
    if (p.q.size[0] > 0 && layout.seqlen > 0 && layout.heads > 0) {
      const auto kernel = sliding_window_fwd_kernel<T>;
      const WindowCut parts = cut<Traits>(kernel, layout);
      if (parts.threads == 0) return launch_status(kOp);
      const int64_t blocks = parts.tiles * layout.heads;
      if (blocks > kMaxBlocks) return too_large(kOp);
      kernel<<<static_cast<unsigned>(blocks), parts.threads, parts.bytes, stream>>>(p, layout);
      const Status launched = launch_status(kOp);
      if (!launched.ok()) return launched;
    }
    if (p.final_k_cache.rank < 0) return Status();
    return write_final_ring<typename T::Element>(p, layout, stream);
  });
}

}  // namespace based::cuda
