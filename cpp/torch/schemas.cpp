// What torch knows of the ops: names, arguments, and which of these an op writes.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(based_ops, m) {
  m.def("taylor_feature_map(Tensor x, float scale) -> Tensor");
  m.def("taylor_feature_map_backward(Tensor dout, Tensor x, float scale) -> Tensor");
  m.def(
      "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? kv_state, Tensor? k_state, "
      "Tensor? cu_seqlens, float scale, bool normalize, bool output_final_state) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_backward(Tensor dout, Tensor? dkv_state, Tensor? dk_state, Tensor q, "
      "Tensor k, Tensor v, Tensor? kv_state, Tensor? k_state, Tensor? cu_seqlens, float scale, "
      "bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_attention_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) kv_state, "
      "Tensor(b!) k_state, Tensor? state_indices, float scale, bool normalize) -> Tensor");
  m.def(
      "linear_attention_decode_deferred(Tensor q, Tensor k, Tensor v, Tensor(a!) kv_state, "
      "Tensor(b!) k_state, Tensor(c!) pending_k, Tensor(d!) pending_v, Tensor fill, "
      "Tensor? state_indices, float scale, bool normalize) -> Tensor");
  m.def(
      "linear_attention_fold(Tensor(a!) kv_state, Tensor(b!) k_state, Tensor pending_k, "
      "Tensor pending_v, Tensor fill, Tensor? state_indices, float scale) -> ()");
  m.def(
      "sliding_window_attention(Tensor q, Tensor k, Tensor v, Tensor? k_cache, Tensor? v_cache, "
      "Tensor? positions, Tensor? cu_seqlens, int window, float scale, bool output_final_state) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sliding_window_attention_backward(Tensor dout, Tensor? dk_cache, Tensor? dv_cache, "
      "Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? k_cache, Tensor? v_cache, "
      "Tensor? positions, Tensor? cu_seqlens, int window, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sliding_window_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, "
      "Tensor(b!) v_cache, Tensor positions, Tensor? state_indices, Tensor? cos, Tensor? sin, "
      "float scale) -> Tensor");
  m.def(
      "short_conv(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor? initial_state, "
      "Tensor? cu_seqlens, bool silu, bool output_final_state) -> (Tensor, Tensor)");
  m.def(
      "short_conv_backward(Tensor dout, Tensor? dfinal_state, Tensor x, Tensor weight, "
      "Tensor? bias, Tensor? gate, Tensor? initial_state, Tensor? cu_seqlens, bool silu) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "short_conv_decode(Tensor x, Tensor weight, Tensor(a!) conv_state, Tensor? bias, "
      "Tensor? gate, Tensor? state_indices, bool silu) -> Tensor");
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias, bool swiglu) -> Tensor");
  m.def(
      "decode_block(Tensor mixed, Tensor x, Tensor out_weight, Tensor? out_bias, "
      "Tensor norm_weight, Tensor fc1, Tensor fc2, Tensor next_norm_weight, Tensor next_weight, "
      "Tensor? next_bias, Tensor(a!) counters, Tensor? conv_weight, Tensor(b!)? conv_state, "
      "Tensor? state_indices, float eps) -> (Tensor, Tensor)");
  // Of each block: out_weight, norm_weight, fc1, fc2, next_norm_weight, next_weight; out_bias and
  // next_bias. Convolutions: of all blocks, or of all but the last.
  m.def(
      "decode_blocks(Tensor mixed, Tensor x, Tensor[] weights, Tensor?[] biases, "
      "Tensor(a!) counters, Tensor[] conv_weights, Tensor(b!)[] conv_states, "
      "Tensor? state_indices, float eps) -> (Tensor, Tensor)");
}
