#include "linear_attention/forward_roles.cuh"
#include "linear_attention/increment_roles.cuh"
#include "linear_attention/launch.cuh"
#include "linear_attention/simt.cuh"
#include "linear_attention/stray_tokens.cuh"

namespace based::cuda {
namespace {

using namespace linear;

// The cut of a call; its workspace holds a state for every (border, head, tile).
Arguments arguments_of(const LinearAttentionParams& p) {
  Arguments a{};
  set_segments(a, p, multiprocessors(), 0.5, 64);
  a.q = rows_of(p.q), a.k = rows_of(p.k), a.v = rows_of(p.v), a.out = rows_of(p.out);
  a.initial = state_of(p.initial_kv_state, p.initial_k_state);
  a.final = state_of(p.final_kv_state, p.final_k_state);
  return a;
}

template <class Tr>
int64_t workspace_bytes(const LinearAttentionParams& p) {
  const Arguments a = arguments_of(p);
  return a.borders * a.heads * a.tiles * kStateFloats<Tr> * int64_t(sizeof(float));
}

template <class Tr>
Status run(const char* op, const LinearAttentionParams& p, void* workspace, Stream stream) {
  Arguments a = arguments_of(p);
  a.workspace = static_cast<float*>(workspace);
  const int64_t blocks = a.segments * a.heads * a.tiles;
  Status status;
  if (a.borders > 0) {
    status = launch_increments<Tr>(op, a, stream);
    if (status.ok()) status = launch_scan<Tr, false>(op, a, stream);
  }
  if (!status.ok()) return status;
  if constexpr (kHasRoles<Tr>) {
    if (runs_wgmma()) {
      return launch(op, forward_roles_kernel<Tr>, blocks, kRoleThreads, sizeof(ForwardRoleSmem<Tr>),
                    stream, a);
    }
  }
  return launch(op, forward_kernel<Tr>, blocks, kThreads, sizeof(ForwardSmem<Tr>), stream, a);
}

}  // namespace

int64_t linear_attention_workspace_size(const LinearAttentionParams& p) {
  if (!validate(p).ok() || p.q.dtype == DType::kFloat32) return 0;
  int64_t bytes = 0;
  const Status status = dispatch_traits("linear_attention", p, [&](auto traits) {
    bytes = workspace_bytes<typename decltype(traits)::type>(p);
    return Status();
  });
  return status.ok() ? bytes : 0;
}

Status linear_attention(const LinearAttentionParams& p, void* workspace, Stream stream) {
  const char* op = "linear_attention";
  Status status = validate(p);
  if (status.ok()) status = check_supported(op, p);
  if (!status.ok() || p.q.size[0] * p.q.size[2] == 0) return status;
  const std::pair<const char*, const TensorView*> tensors[] = {
      {"q", &p.q}, {"k", &p.k}, {"v", &p.v}, {"out", &p.out}};
  const bool simt = p.q.dtype == DType::kFloat32;
  for (const auto& [name, view] : tensors) {
    if (status.ok() && !simt) status = check_aligned(op, name, *view);
  }
  if (status.ok()) status = fill_stray_tokens(op, p.cu_seqlens, {p.out}, stream);
  if (!status.ok()) return status;
  if (simt) return simt_forward(op, p, stream);
  return dispatch_traits(op, p, [&](auto traits) {
    return run<typename decltype(traits)::type>(op, p, workspace, stream);
  });
}

}  // namespace based::cuda
