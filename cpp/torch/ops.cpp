// The torch ops of schemas.cpp but those of products.cpp: for each, Tensor -> params -> run. Checks
// are the library's; outputs are allocated only from sizes that are safe to read on any input.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <tuple>

#include "run.h"

namespace based::binding {

cuda::Stream current_stream(int device_index) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  // Python loads libtorch_cuda with local symbols: ask that library, and only if it is loaded.
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  static const auto getter =
      library == nullptr
          ? nullptr
          : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  if (getter == nullptr) throw std::runtime_error("based_ops: this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device_index, &stream));
  return stream;
}

void raise_no_cuda(const char* op) {
  std::string supported;
  for (const char* name : kCudaOps)
    supported += (supported.empty() ? "" : ", ") + std::string(name);
  throw std::runtime_error(std::string(op) + ": expected CPU tensors (" +
                           (supported.empty() ? "this build has no CUDA kernels"
                                              : "CUDA kernels exist for: " + supported) +
                           "), got CUDA tensors");
}

bool& checks_enabled() {
  static bool enabled = [] {
    const char* value = std::getenv("BASED_CHECKS");
    return value != nullptr && std::strcmp(value, "1") == 0;
  }();
  return enabled;
}

namespace {

// ---- taylor_feature_map ------------------------------------------------------------------------

Tensor taylor_feature_map(const Tensor& x, double scale) {
  TaylorFeatureMapParams p;
  p.x = view(x), p.scale = scale;
  Tensor out = fresh_like(x);
  if (p.x.rank >= 1 && p.x.rank <= kMaxRank) {
    int64_t sizes[kMaxRank];
    for (int i = 0; i < p.x.rank; ++i) sizes[i] = p.x.size[i];
    sizes[p.x.rank - 1] = expanded_dim(sizes[p.x.rank - 1]);
    out = empty(x, sizes, p.x.rank, x.scalar_type());
  }
  p.out = view(out);
  run("taylor_feature_map", x, p, cpu::taylor_feature_map);
  return out;
}

Tensor taylor_feature_map_backward(const Tensor& dout, const Tensor& x, double scale) {
  TaylorFeatureMapBackwardParams p;
  const Tensor dx = fresh_like(x);
  p.x = view(x), p.dout = view(dout), p.dx = view(dx), p.scale = scale;
  run("taylor_feature_map_backward", x, p, cpu::taylor_feature_map_backward);
  return dx;
}

// ---- linear_attention --------------------------------------------------------------------------

// The tensor-core kernels read rows 16 bytes at a time: rows that start elsewhere are copied first.
Tensor aligned(const Tensor& x) {
  if (x.is_cpu() || x.dim() != 4 || x.scalar_type() == ScalarType::Float) return x;
  const int64_t elements = 16 / 2;
  bool fits = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < 3; ++i) fits = fits && (x.size(i) <= 1 || x.stride(i) % elements == 0);
  if (fits || x.stride(3) != 1) return x;
  Tensor copy = fresh_like(x);
  return torch::stable::copy_(copy, x);
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const OptionalTensor& kv_state,
                                                    const OptionalTensor& k_state,
                                                    const OptionalTensor& cu_seqlens, double scale,
                                                    bool normalize, bool output_final_state) {
  const Tensor out = fresh_like(v);
  Tensor final_kv, final_k;
  LinearAttentionParams p;
  if (output_final_state) {
    const int64_t n = sequences_of(cu_seqlens, size_of(q, 0)), heads = size_of(q, 2);
    const int64_t expanded = expanded_dim(size_of(q, 3));
    final_kv = empty(q, {n, heads, expanded, size_of(v, 3)}, accumulator_of(q));
    final_k = empty(q, {n, heads, expanded}, accumulator_of(q));
    p.final_kv_state = view(final_kv), p.final_k_state = view(final_k);
  }
  const Tensor q_rows = aligned(q), k_rows = aligned(k), v_rows = aligned(v);
  p.q = view(q_rows), p.k = view(k_rows), p.v = view(v_rows), p.out = view(out);
  p.initial_kv_state = view(kv_state), p.initial_k_state = view(k_state);
  p.cu_seqlens = view(cu_seqlens), p.scale = scale, p.normalize = normalize;
  run<LinearAttentionParams>("linear_attention", q, p, cpu::linear_attention);
  return {out, final_kv, final_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_backward(
    const Tensor& dout, const OptionalTensor& dkv_state, const OptionalTensor& dk_state,
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv_state,
    const OptionalTensor& k_state, const OptionalTensor& cu_seqlens, double scale, bool normalize) {
  const Tensor dq = fresh_like(q), dk = fresh_like(k), dv = fresh_like(v);
  const Tensor dkv0 = fresh_like(kv_state);
  const Tensor dk0 = fresh_like(k_state);
  LinearAttentionBackwardParams p;
  const Tensor q_rows = aligned(q), k_rows = aligned(k), v_rows = aligned(v);
  const Tensor dout_rows = aligned(dout);
  p.q = view(q_rows), p.k = view(k_rows), p.v = view(v_rows), p.dout = view(dout_rows);
  p.initial_kv_state = view(kv_state), p.initial_k_state = view(k_state);
  p.dfinal_kv_state = view(dkv_state), p.dfinal_k_state = view(dk_state);
  p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  p.dinitial_kv_state = view(dkv0);
  p.dinitial_k_state = view(dk0);
  p.cu_seqlens = view(cu_seqlens), p.scale = scale, p.normalize = normalize;
  run<LinearAttentionBackwardParams>("linear_attention_backward", q, p,
                                     cpu::linear_attention_backward);
  return {dq, dk, dv, dkv0, dk0};
}

Tensor linear_attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, Tensor kv_state,
                               Tensor k_state, const OptionalTensor& state_indices, double scale,
                               bool normalize) {
  const Tensor out = fresh_like(v);
  LinearAttentionDecodeParams p;
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out);
  p.kv_state = view(kv_state), p.k_state = view(k_state), p.state_indices = view(state_indices);
  p.scale = scale, p.normalize = normalize;
  run<LinearAttentionDecodeParams>("linear_attention_decode", q, p, cpu::linear_attention_decode);
  return out;
}

Tensor linear_attention_decode_deferred(const Tensor& q, const Tensor& k, const Tensor& v,
                                        Tensor kv_state, Tensor k_state, Tensor pending_k,
                                        Tensor pending_v, const Tensor& fill,
                                        const OptionalTensor& state_indices, double scale,
                                        bool normalize) {
  const Tensor out = fresh_like(v);
  LinearAttentionDecodeDeferredParams p;
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out);
  p.kv_state = view(kv_state), p.k_state = view(k_state), p.state_indices = view(state_indices);
  p.pending_k = view(pending_k), p.pending_v = view(pending_v), p.fill = view(fill);
  p.scale = scale, p.normalize = normalize;
  run("linear_attention_decode_deferred", q, p, cpu::linear_attention_decode_deferred);
  return out;
}

void linear_attention_fold(Tensor kv_state, Tensor k_state, const Tensor& pending_k,
                           const Tensor& pending_v, const Tensor& fill,
                           const OptionalTensor& state_indices, double scale) {
  LinearAttentionFoldParams p;
  p.kv_state = view(kv_state), p.k_state = view(k_state), p.state_indices = view(state_indices);
  p.pending_k = view(pending_k), p.pending_v = view(pending_v), p.fill = view(fill);
  p.scale = scale;
  run("linear_attention_fold", pending_k, p, cpu::linear_attention_fold);
}

// ---- sliding_window ----------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sliding_window_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_cache,
    const OptionalTensor& v_cache, const OptionalTensor& positions,
    const OptionalTensor& cu_seqlens, int64_t window, double scale, bool output_final_state) {
  const Tensor out = fresh_like(q);
  const Tensor lse = empty(q, {size_of(q, 0), size_of(q, 1), size_of(q, 2)}, accumulator_of(q));
  Tensor final_k, final_v, final_positions;
  SlidingWindowParams p;
  if (output_final_state) {
    const int64_t n = sequences_of(cu_seqlens, size_of(q, 0)), slots = window > 0 ? window : 0;
    final_k = empty(q, {n, slots, size_of(q, 2), size_of(q, 3)}, q.scalar_type());
    final_v = fresh_like(final_k);
    final_positions = empty(q, {n}, positions ? positions->scalar_type() : ScalarType::Long);
    p.final_k_cache = view(final_k), p.final_v_cache = view(final_v);
    p.final_positions = view(final_positions);
  }
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out), p.lse = view(lse);
  p.initial_k_cache = view(k_cache), p.initial_v_cache = view(v_cache);
  p.initial_positions = view(positions), p.cu_seqlens = view(cu_seqlens);
  p.window = window, p.scale = scale;
  run<SlidingWindowParams>("sliding_window_attention", q, p, cpu::sliding_window_attention);
  return {out, lse, final_k, final_v, final_positions};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sliding_window_attention_backward(
    const Tensor& dout, const OptionalTensor& dk_cache, const OptionalTensor& dv_cache,
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
    const OptionalTensor& k_cache, const OptionalTensor& v_cache, const OptionalTensor& positions,
    const OptionalTensor& cu_seqlens, int64_t window, double scale) {
  const Tensor dq = fresh_like(q), dk = fresh_like(k), dv = fresh_like(v);
  const Tensor dk0 = fresh_like(k_cache);
  const Tensor dv0 = fresh_like(v_cache);
  SlidingWindowBackwardParams p;
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out), p.lse = view(lse);
  p.dout = view(dout), p.dfinal_k_cache = view(dk_cache), p.dfinal_v_cache = view(dv_cache);
  p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  p.initial_k_cache = view(k_cache), p.initial_v_cache = view(v_cache);
  p.dinitial_k_cache = view(dk0);
  p.dinitial_v_cache = view(dv0);
  p.initial_positions = view(positions), p.cu_seqlens = view(cu_seqlens);
  p.window = window, p.scale = scale;
  run<SlidingWindowBackwardParams>("sliding_window_attention_backward", q, p,
                                   cpu::sliding_window_attention_backward);
  return {dq, dk, dv, dk0, dv0};
}

Tensor sliding_window_decode(const Tensor& q, const Tensor& k, const Tensor& v, Tensor k_cache,
                             Tensor v_cache, const Tensor& positions,
                             const OptionalTensor& state_indices, const OptionalTensor& cos,
                             const OptionalTensor& sin, double scale) {
  const Tensor out = fresh_like(q);
  SlidingWindowDecodeParams p;
  p.q = view(q), p.k = view(k), p.v = view(v), p.out = view(out);
  p.k_cache = view(k_cache), p.v_cache = view(v_cache), p.positions = view(positions);
  p.state_indices = view(state_indices), p.cos = view(cos), p.sin = view(sin), p.scale = scale;
  run<SlidingWindowDecodeParams>("sliding_window_decode", q, p, cpu::sliding_window_decode);
  return out;
}

// ---- short_conv --------------------------------------------------------------------------------

Activation activation_of(bool silu) { return silu ? Activation::kSilu : Activation::kNone; }

std::tuple<Tensor, Tensor> short_conv(const Tensor& x, const Tensor& weight,
                                      const OptionalTensor& bias, const OptionalTensor& gate,
                                      const OptionalTensor& initial_state,
                                      const OptionalTensor& cu_seqlens, bool silu,
                                      bool output_final_state) {
  const Tensor out = fresh_like(x);
  Tensor final_state;
  ShortConvParams p;
  if (output_final_state) {
    const int64_t taps = size_of(weight, 1), n = sequences_of(cu_seqlens, size_of(x, 0));
    final_state = empty(x, {n, size_of(x, 2), taps > 0 ? taps - 1 : 0}, x.scalar_type());
    p.final_state = view(final_state);
  }
  p.x = view(x), p.weight = view(weight), p.bias = view(bias), p.gate = view(gate);
  p.initial_state = view(initial_state), p.cu_seqlens = view(cu_seqlens), p.out = view(out);
  p.activation = activation_of(silu);
  run<ShortConvParams>("short_conv", x, p, cpu::short_conv);
  return {out, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> short_conv_backward(
    const Tensor& dout, const OptionalTensor& dfinal_state, const Tensor& x, const Tensor& weight,
    const OptionalTensor& bias, const OptionalTensor& gate, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, bool silu) {
  const Tensor dx = fresh_like(x), dweight = fresh_like(weight);
  const Tensor dbias = fresh_like(bias);
  const Tensor dgate = fresh_like(gate);
  const Tensor dinitial = fresh_like(initial_state);
  ShortConvBackwardParams p;
  p.x = view(x), p.weight = view(weight), p.bias = view(bias), p.gate = view(gate);
  p.initial_state = view(initial_state), p.cu_seqlens = view(cu_seqlens);
  p.dout = view(dout), p.dfinal_state = view(dfinal_state);
  p.dx = view(dx), p.dweight = view(dweight);
  p.dbias = view(dbias);
  p.dgate = view(dgate);
  p.dinitial_state = view(dinitial);
  p.activation = activation_of(silu);
  run<ShortConvBackwardParams>("short_conv_backward", x, p, cpu::short_conv_backward);
  return {dx, dweight, dbias, dgate, dinitial};
}

Tensor short_conv_decode(const Tensor& x, const Tensor& weight, Tensor conv_state,
                         const OptionalTensor& bias, const OptionalTensor& gate,
                         const OptionalTensor& state_indices, bool silu) {
  const Tensor out = fresh_like(x);
  ShortConvDecodeParams p;
  p.x = view(x), p.weight = view(weight), p.bias = view(bias), p.gate = view(gate);
  p.conv_state = view(conv_state), p.state_indices = view(state_indices), p.out = view(out);
  p.activation = activation_of(silu);
  run<ShortConvDecodeParams>("short_conv_decode", x, p, cpu::short_conv_decode);
  return out;
}

// The same functions serve both keys: run() follows the tensors.
void register_implementations(torch::stable::detail::StableLibrary& m) {
  m.impl("taylor_feature_map", TORCH_BOX(&taylor_feature_map));
  m.impl("taylor_feature_map_backward", TORCH_BOX(&taylor_feature_map_backward));
  m.impl("linear_attention", TORCH_BOX(&linear_attention));
  m.impl("linear_attention_backward", TORCH_BOX(&linear_attention_backward));
  m.impl("linear_attention_decode", TORCH_BOX(&linear_attention_decode));
  m.impl("linear_attention_decode_deferred", TORCH_BOX(&linear_attention_decode_deferred));
  m.impl("linear_attention_fold", TORCH_BOX(&linear_attention_fold));
  m.impl("sliding_window_attention", TORCH_BOX(&sliding_window_attention));
  m.impl("sliding_window_attention_backward", TORCH_BOX(&sliding_window_attention_backward));
  m.impl("sliding_window_decode", TORCH_BOX(&sliding_window_decode));
  m.impl("short_conv", TORCH_BOX(&short_conv));
  m.impl("short_conv_backward", TORCH_BOX(&short_conv_backward));
  m.impl("short_conv_decode", TORCH_BOX(&short_conv_decode));
}

}  // namespace
}  // namespace based::binding

STABLE_TORCH_LIBRARY_IMPL(based_ops, CPU, m) { based::binding::register_implementations(m); }

STABLE_TORCH_LIBRARY_IMPL(based_ops, CUDA, m) { based::binding::register_implementations(m); }
