#include "sliding_window/backward_fused.cuh"
#include "sliding_window/launch.cuh"

namespace based::cuda {
namespace {

constexpr const char* kOp = "sliding_window_attention_backward";

// Slots for the two rings: what the walk needs, and more where it fits, so that loads run ahead.
template <class Tile>
bool choose_slots(FusedLayout& fused, int bytes) {
  fused.key_slots = fused.q_slots = fused.back;
  while (fused.key_slots + fused.q_slots < 2 * fused.back + 5) {
    const bool keys = fused.key_slots <= fused.q_slots;
    if (FusedShared<Tile>::size(fused.key_slots + keys, fused.q_slots + !keys) > bytes) break;
    ++(keys ? fused.key_slots : fused.q_slots);
  }
  return FusedShared<Tile>::size(fused.key_slots, fused.q_slots) <= bytes;
}

// Rows of a CTA: a multiple of 64 such that the CTAs come out even on the multiprocessors.
void cut_rows(WindowLayout& l, int back, int processors) {
  const int64_t sequences = std::max<int64_t>(l.sequences, 1);
  const int64_t length = l.packed ? (l.seqlen + sequences - 1) / sequences : l.seqlen;
  const int64_t blocks = std::max<int64_t>((length + kGroupRows - 1) / kGroupRows, 1);
  double best = 0;
  for (int64_t cuts = 1; cuts <= std::min<int64_t>(blocks, 4 * processors); ++cuts) {
    const int64_t each = (blocks + cuts - 1) / cuts;
    const int64_t ctas = sequences * l.heads * ((blocks + each - 1) / each);
    const double time = double((ctas + processors - 1) / processors) * (each + 0.5 * back + 1);
    if (cuts == 1 || time < best) best = time, l.rows = static_cast<int>(each * kGroupRows);
    if (ctas > 8 * processors) break;
  }
  l.tiles_of_each = (l.seqlen + l.rows - 1) / l.rows;
}

}  // namespace

bool launch_fused_backward(const SlidingWindowBackwardParams& p, WindowLayout layout,
                           cudaStream_t stream, Status& status) {
  if (p.q.dtype == DType::kFloat32 || !layout.aligned || layout.ring_size > 0 ||
      layout.head_dim > 128 || p.q.size[0] == 0 || layout.seqlen == 0 || layout.heads == 0) {
    return false;
  }
  bool launched = false;
  status = dispatch_tile<GroupTile>(kOp, p.q, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(typename T::Element) == 2 && T::kV <= 128) {
      const auto kernel = sliding_window_bwd_fused_kernel<T>;
      cudaFuncAttributes attributes;
      int device = 0, shared = 0, processors = 1;
      if (cudaGetDevice(&device) != cudaSuccess ||
          cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) !=
              cudaSuccess ||
          cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) !=
              cudaSuccess ||
          cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
        return launch_status(kOp);
      }
      FusedLayout fused = {(layout.window + kGroupRows - 2) / kGroupRows + 1, 0, 0};
      if (attributes.maxThreadsPerBlock < FusedShared<T>::kThreads ||
          !choose_slots<T>(fused, shared)) {
        return Status();
      }
      cut_rows(layout, fused.back, processors);
      const int64_t tiles = layout.packed ? layout.seqlen / layout.rows + layout.sequences + 1
                                          : layout.sequences * layout.tiles_of_each;
      if (tiles * layout.heads > kMaxBlocks) return too_large(kOp);
      const int bytes = FusedShared<T>::size(fused.key_slots, fused.q_slots);
      if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) !=
          cudaSuccess) {
        return launch_status(kOp);
      }
      kernel<<<static_cast<unsigned>(tiles * layout.heads), FusedShared<T>::kThreads, bytes,
               stream>>>(p, layout, fused);
      launched = true;
      return launch_status(kOp);
    }
    return Status();
  });
  return launched || !status.ok();
}

}  // namespace based::cuda
