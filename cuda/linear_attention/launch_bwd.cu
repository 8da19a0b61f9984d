#include "linear_attention/backward_dkv.cuh"
#include "linear_attention/backward_dkv_roles.cuh"
#include "linear_attention/backward_dq.cuh"
#include "linear_attention/backward_dq_roles.cuh"
#include "linear_attention/launch.cuh"
#include "linear_attention/simt_bwd.cuh"
#include "linear_attention/stray_tokens.cuh"

namespace based::cuda {
namespace {

using namespace linear;

// The workspace, in this order: a state per (border, head, tile); 1 / den and delta of every token;
// shares of dq, dk where V takes several tiles; shares of the initial k_state's gradient.
struct Layout {
  int64_t states, scalars, gradient, r;  // floats

  int64_t bytes() const {
    return (states + 2 * scalars + 2 * gradient + r) * int64_t(sizeof(float));
  }
};

// States stay below a quarter of the inputs' size, or as many as it takes to fill the GPU twice.
template <class Tr>
Arguments arguments_of(const LinearAttentionBackwardParams& p) {
  Arguments a{};
  const int64_t tokens = p.q.size[0] * p.q.size[1] * p.q.size[2], tiles = (p.v.size[3] + 63) / 64;
  const int64_t tasks = p.q.size[0] * p.q.size[2] * tiles, sms = multiprocessors();
  const int64_t budget = tokens * (2 * (2 * p.q.size[3] + p.v.size[3]) / 4 - 8 * tiles);
  const int64_t one_cut = tasks * kStateFloats<Tr> * int64_t(sizeof(float));
  const int64_t most = std::max(budget / one_cut, (2 * sms + tasks - 1) / tasks);
  set_segments(a, p, sms, 0.25, std::min<int64_t>(most, 128));
  a.q = rows_of(p.q), a.k = rows_of(p.k), a.v = rows_of(p.v), a.dout = rows_of(p.dout);
  a.dq = rows_of(p.dq), a.dk = rows_of(p.dk), a.dv = rows_of(p.dv);
  a.initial = state_of(p.initial_kv_state, p.initial_k_state);
  a.final = state_of(p.dfinal_kv_state, p.dfinal_k_state);
  a.dinitial = state_of(p.dinitial_kv_state, p.dinitial_k_state);
  return a;
}

template <class Tr>
Layout layout_of(const LinearAttentionBackwardParams& p, const Arguments& a) {
  const int64_t tokens = p.q.size[0] * p.q.size[1] * p.q.size[2] * a.tiles;
  return {a.borders * a.heads * a.tiles * kStateFloats<Tr>, tokens,
          a.tiles > 1 ? tokens * Tr::D : 0,
          a.dinitial.kv != nullptr ? a.sequences * a.heads * a.tiles * int64_t(Tr::kF) : 0};
}

template <class Tr>
Status run(const char* op, const LinearAttentionBackwardParams& p, void* workspace, Stream stream) {
  using Element = typename Tr::Element;
  Arguments a = arguments_of<Tr>(p);
  const Layout layout = layout_of<Tr>(p, a);
  a.workspace = static_cast<float*>(workspace);
  a.inverse_den = a.workspace + layout.states, a.delta = a.inverse_den + layout.scalars;
  float* partial = a.delta + layout.scalars;
  if (a.tiles > 1) a.partial_dq = partial, a.partial_dk = partial + layout.gradient;
  a.partial_r = partial + 2 * layout.gradient;
  // The shares of a tile, as a tensor.
  const auto shares = [&](float* data) {
    TensorView view = p.q;
    view.data = data, view.dtype = DType::kFloat32;
    view.stride[1] = a.heads * Tr::D, view.stride[2] = Tr::D;
    return view;
  };

  const int64_t blocks = a.segments * a.heads * a.tiles;
  const int64_t borders = a.borders * a.heads * a.tiles;
  const bool cut = borders > 0;
  Status status;
  if (a.tiles > 1) {
    status =
        fill_stray_tokens(op, p.cu_seqlens, {shares(a.partial_dq), shares(a.partial_dk)}, stream);
  }
  const auto then = [&](const auto& next) {
    if (status.ok()) status = next();
  };
  if (cut) {
    then([&] { return launch_increments<Tr>(op, a, stream); });
    then([&] { return launch_scan<Tr, false>(op, a, stream); });
  }
  then([&] {
    if constexpr (kHasRoles<Tr>) {
      if (runs_wgmma()) {
        return launch(op, dq_roles_kernel<Tr>, blocks, kRoleThreads, sizeof(DqRoleSmem<Tr>), stream,
                      a);
      }
    }
    return launch(op, dq_kernel<Tr>, blocks, kThreads, sizeof(BackwardSmem<Tr>), stream, a);
  });
  if (cut) {
    then([&] {
      if constexpr (kHasRoles<Tr>) {
        if (runs_wgmma()) {
          return launch(op, increment_roles_kernel<Tr, true>, borders, kIncrementThreads,
                        sizeof(IncrementRoleSmem<Tr>), stream, a);
        }
      }
      return launch(op, gradient_increment_kernel<Tr>, borders, kThreads,
                    sizeof(GradientIncrementSmem<Tr>), stream, a);
    });
    then([&] { return launch_scan<Tr, true>(op, a, stream); });
  }
  then([&] {
    if constexpr (kHasRoles<Tr>) {
      if (runs_wgmma()) {
        return launch(op, dkv_roles_kernel<Tr>, blocks, kRoleThreads, sizeof(DkvRoleSmem<Tr>),
                      stream, a);
      }
    }
    return launch(op, dkv_kernel<Tr>, blocks, kThreads, sizeof(BackwardSmem<Tr>), stream, a);
  });
  if (a.tiles > 1) {
    const int64_t pairs = p.q.size[0] * p.q.size[1] * p.q.size[2] * Tr::D / 2;
    for (const auto& [to, share] : {std::pair{a.dq, a.partial_dq}, std::pair{a.dk, a.partial_dk}}) {
      then([&, to = to, share = share] {
        return launch(op, add_tiles_kernel<Element>, (pairs + 255) / 256, 256, 0, stream, to, share,
                      a.seqlen, a.heads, int(Tr::D), a.tiles, pairs);
      });
    }
  }
  if (a.dinitial.kv != nullptr) {
    const int F = Tr::kConstant + 1;
    const int64_t count = a.sequences * a.heads * F;
    then([&] {
      return launch(op, add_r_kernel, (count + 255) / 256, 256, 0, stream, a.dinitial, a.partial_r,
                    a.heads, F, int(Tr::kF), a.tiles, count);
    });
  }
  return status;
}

}  // namespace

int64_t linear_attention_backward_workspace_size(const LinearAttentionBackwardParams& p) {
  if (!validate(p).ok() || p.q.size[0] * p.q.size[2] == 0) return 0;
  if (p.q.dtype == DType::kFloat32) return simt_backward_bytes(p);
  int64_t bytes = 0;
  const Status status = dispatch_traits("linear_attention_backward", p, [&](auto traits) {
    using Tr = typename decltype(traits)::type;
    bytes = layout_of<Tr>(p, arguments_of<Tr>(p)).bytes();
    return Status();
  });
  return status.ok() ? bytes : 0;
}

Status linear_attention_backward(const LinearAttentionBackwardParams& p, void* workspace,
                                 Stream stream) {
  const char* op = "linear_attention_backward";
  Status status = validate(p);
  if (status.ok()) status = check_supported(op, p);
  if (!status.ok() || p.q.size[0] * p.q.size[2] == 0) return status;
  const std::pair<const char*, const TensorView*> tensors[] = {
      {"q", &p.q},   {"k", &p.k},   {"v", &p.v},  {"dout", &p.dout},
      {"dq", &p.dq}, {"dk", &p.dk}, {"dv", &p.dv}};
  const bool simt = p.q.dtype == DType::kFloat32;
  for (const auto& [name, view] : tensors) {
    if (status.ok() && !simt) status = check_aligned(op, name, *view);
  }
  if (status.ok()) status = fill_stray_tokens(op, p.cu_seqlens, {p.dq, p.dk, p.dv}, stream);
  if (!status.ok()) return status;
  if (simt) return simt_backward(op, p, workspace, stream);
  return dispatch_traits(op, p, [&](auto traits) {
    return run<typename decltype(traits)::type>(op, p, workspace, stream);
  });
}

}  // namespace based::cuda
