#include "validate.h"

#include "checker.h"

namespace based {
namespace {

// Number of sequences: B, or the packed ones. Checks cu_seqlens and that packing has B = 1.
int64_t sequences(Checker& check, const TensorView& cu_seqlens, int64_t batch) {
  if (!given(cu_seqlens)) return batch;
  check.index("cu_seqlens", cu_seqlens, "(N+1,)", {kAny});
  if (!check.ok()) return 0;
  check.require(batch == 1, "cu_seqlens", "batch 1 (packed sequences)", double(batch));
  check.require(cu_seqlens.size[0] >= 1, "cu_seqlens", "N+1 >= 1 entries", 0);
  return cu_seqlens.size[0] - 1;
}

void check_linear_state(Checker& check, const char* kv_name, const TensorView& kv,
                        const char* k_name, const TensorView& k, int64_t rows, int64_t heads,
                        int64_t feature_dim, int64_t head_dim) {
  check.together(given(kv) ? k_name : kv_name, kv, k);
  if (!given(kv)) return;
  const int64_t expanded = expanded_dim(feature_dim);
  check.wide(kv_name, kv, "(N, H, F, V)", {rows, heads, expanded, head_dim});
  check.wide(k_name, k, "(N, H, F)", {rows, heads, expanded});
}

void check_linear_attention(Checker& check, const LinearAttentionParams& p) {
  check.first("(B, T, H, D)", {kAny, kAny, kAny, kAny});
  if (!check.ok()) return;
  const int64_t batch = p.q.size[0], seqlen = p.q.size[1], heads = p.q.size[2];
  const int64_t feature_dim = p.q.size[3];
  check.require(feature_dim >= 1, "q", "feature_dim >= 1", double(feature_dim));
  check.require(p.scale > 0, "scale", "a number > 0", p.scale);
  check.same("k", p.k, "(B, T, H, D)", {batch, seqlen, heads, feature_dim});
  check.same("v", p.v, "(B, T, H, V)", {batch, seqlen, heads, kAny});
  if (!check.ok()) return;
  const int64_t head_dim = p.v.size[3];
  check.require(head_dim >= 1, "v", "head_dim >= 1", double(head_dim));
  const int64_t n = sequences(check, p.cu_seqlens, batch);
  check_linear_state(check, "initial_kv_state", p.initial_kv_state, "initial_k_state",
                     p.initial_k_state, n, heads, feature_dim, head_dim);
  check_linear_state(check, "final_kv_state", p.final_kv_state, "final_k_state", p.final_k_state, n,
                     heads, feature_dim, head_dim);
}

void check_sliding_window(Checker& check, const SlidingWindowParams& p) {
  check.first("(B, T, H, V)", {kAny, kAny, kAny, kAny});
  if (!check.ok()) return;
  const int64_t batch = p.q.size[0], seqlen = p.q.size[1], heads = p.q.size[2];
  const int64_t head_dim = p.q.size[3], window = p.window;
  check.require(head_dim >= 1, "q", "head_dim >= 1", double(head_dim));
  check.require(window >= 1, "window", "an integer >= 1", double(window));
  check.require(p.scale > 0, "scale", "a number > 0", p.scale);
  check.same("k", p.k, "(B, T, H, V)", {batch, seqlen, heads, head_dim});
  check.same("v", p.v, "(B, T, H, V)", {batch, seqlen, heads, head_dim});
  const int64_t n = sequences(check, p.cu_seqlens, batch);
  const auto ring = [&](const char* k_name, const TensorView& k, const char* v_name,
                        const TensorView& v, const char* at_name, const TensorView& at) {
    check.together(given(k) ? v_name : k_name, k, v);
    check.together(given(k) ? at_name : k_name, k, at);
    if (!given(k)) return;
    check.same(k_name, k, "(N, W, H, V)", {n, window, heads, head_dim});
    check.same(v_name, v, "(N, W, H, V)", {n, window, heads, head_dim});
    check.index(at_name, at, "(N,)", {n});
  };
  ring("initial_k_cache", p.initial_k_cache, "initial_v_cache", p.initial_v_cache,
       "initial_positions", p.initial_positions);
  ring("final_k_cache", p.final_k_cache, "final_v_cache", p.final_v_cache, "final_positions",
       p.final_positions);
}

void check_conv_weight(Checker& check, const TensorView& weight, const TensorView& bias,
                       int64_t channels) {
  check.same("weight", weight, "(C, K)", {channels, kAny});
  if (!check.ok()) return;
  const int64_t taps = weight.size[1];
  check.require(taps >= 2 && taps <= 8, "weight", "K = 2..8 taps", double(taps));
  if (given(bias)) check.same("bias", bias, "(C,)", {channels});
}

void check_short_conv(Checker& check, const ShortConvParams& p) {
  check.first("(B, T, C)", {kAny, kAny, kAny});
  if (!check.ok()) return;
  const int64_t batch = p.x.size[0], seqlen = p.x.size[1], channels = p.x.size[2];
  check_conv_weight(check, p.weight, p.bias, channels);
  if (!check.ok()) return;
  const int64_t history = p.weight.size[1] - 1;
  if (given(p.gate)) check.same("gate", p.gate, "(B, T, C)", {batch, seqlen, channels});
  const int64_t n = sequences(check, p.cu_seqlens, batch);
  const auto state = [&](const char* argument, const TensorView& view) {
    if (given(view)) check.same(argument, view, "(N, C, K-1)", {n, channels, history});
  };
  state("initial_state", p.initial_state);
  state("final_state", p.final_state);
}

int64_t last_size(const TensorView& view) { return view.size[view.rank - 1]; }

void check_taylor(Checker& check, const TaylorFeatureMapParams& p) {
  if (p.x.rank == 0 || p.x.rank > kMaxRank) {
    return check.fail("x", "shape (..., D), 1 to 4 dimensions",
                      shape_text(p.x.size, p.x.rank).chars);
  }
  check.first("(..., D)", given(p.x) ? Shape(p.x, kAny) : Shape{kAny});
  if (!check.ok()) return;
  check.require(last_size(p.x) >= 1, "x", "feature_dim >= 1", double(last_size(p.x)));
  check.require(p.scale > 0, "scale", "a number > 0", p.scale);
}

// Slots a decode state must have: any number with state_indices, else one per row.
int64_t slot_count(Checker& check, const TensorView& state_indices, int64_t batch) {
  if (!given(state_indices)) return batch;
  check.index("state_indices", state_indices, "(B,)", {batch});
  return kAny;
}

void check_linear_decode(Checker& check, const LinearAttentionDecodeParams& p) {
  check.first("(B, H, D)", {kAny, kAny, kAny});
  if (!check.ok()) return;
  const int64_t batch = p.q.size[0], heads = p.q.size[1], feature_dim = p.q.size[2];
  check.require(feature_dim >= 1, "q", "feature_dim >= 1", double(feature_dim));
  check.require(p.scale > 0, "scale", "a number > 0", p.scale);
  check.same("k", p.k, "(B, H, D)", {batch, heads, feature_dim});
  check.same("v", p.v, "(B, H, V)", {batch, heads, kAny});
  if (!check.ok()) return;
  const int64_t head_dim = p.v.size[2], slots = slot_count(check, p.state_indices, batch);
  check.require(head_dim >= 1, "v", "head_dim >= 1", double(head_dim));
  check_linear_state(check, "kv_state", p.kv_state, "k_state", p.k_state, slots, heads, feature_dim,
                     head_dim);
  if (check.ok()) {
    check.require(given(p.kv_state), "kv_state", "a state (slots, H, F, V)", 0);
    check.require(p.k_state.size[0] == p.kv_state.size[0], "k_state", "as many slots as kv_state",
                  double(p.k_state.size[0]));
  }
  check.same("out", p.out, "(B, H, V)", {batch, heads, head_dim});
}

// The rings of waiting tokens.
template <class Params>
void check_pending(Checker& check, const Params& p, int64_t slots, int64_t heads,
                   int64_t feature_dim, int64_t head_dim) {
  check.same("pending_k", p.pending_k, "(slots, C, H, D)", {slots, kAny, heads, feature_dim});
  if (!check.ok()) return;
  const int64_t capacity = p.pending_k.size[1];
  check.require(capacity >= 1, "pending_k", "C >= 1", double(capacity));
  check.same("pending_v", p.pending_v, "(slots, C, H, V)", {slots, capacity, heads, head_dim});
}

}  // namespace

Status validate(const TaylorFeatureMapParams& p) {
  Checker check("taylor_feature_map", p.x, "x");
  check_taylor(check, p);
  if (check.ok()) check.same("out", p.out, "(..., F)", Shape(p.x, expanded_dim(last_size(p.x))));
  return check.status();
}

Status validate(const TaylorFeatureMapBackwardParams& p) {
  Checker check("taylor_feature_map_backward", p.x, "x");
  check_taylor(check, p);
  if (!check.ok()) return check.status();
  check.same("dout", p.dout, "(..., F)", Shape(p.x, expanded_dim(last_size(p.x))));
  check.same("dx", p.dx, "(..., D)", Shape(p.x, last_size(p.x)));
  return check.status();
}

Status validate(const LinearAttentionParams& p) {
  Checker check("linear_attention", p.q, "q");
  check_linear_attention(check, p);
  if (check.ok()) check.same("out", p.out, "(B, T, H, V)", Shape(p.v, last_size(p.v)));
  return check.status();
}

Status validate(const LinearAttentionBackwardParams& p) {
  Checker check("linear_attention_backward", p.q, "q");
  check_linear_attention(check, p);
  if (!check.ok()) return check.status();
  const int64_t n = given(p.cu_seqlens) ? p.cu_seqlens.size[0] - 1 : p.q.size[0];
  const int64_t heads = p.q.size[2], feature_dim = p.q.size[3], head_dim = p.v.size[3];
  check.same("dout", p.dout, "(B, T, H, V)", Shape(p.v, head_dim));
  check.same("dq", p.dq, "(B, T, H, D)", Shape(p.q, feature_dim));
  check.same("dk", p.dk, "(B, T, H, D)", Shape(p.q, feature_dim));
  check.same("dv", p.dv, "(B, T, H, V)", Shape(p.v, head_dim));
  check_linear_state(check, "dfinal_kv_state", p.dfinal_kv_state, "dfinal_k_state",
                     p.dfinal_k_state, n, heads, feature_dim, head_dim);
  check_linear_state(check, "dinitial_kv_state", p.dinitial_kv_state, "dinitial_k_state",
                     p.dinitial_k_state, n, heads, feature_dim, head_dim);
  return check.status();
}

Status validate(const LinearAttentionDecodeParams& p) {
  Checker check("linear_attention_decode", p.q, "q");
  check_linear_decode(check, p);
  return check.status();
}

Status validate(const LinearAttentionDecodeDeferredParams& p) {
  Checker check("linear_attention_decode_deferred", p.q, "q");
  check_linear_decode(check, p);
  if (!check.ok()) return check.status();
  check_pending(check, p, p.kv_state.size[0], p.q.size[1], p.q.size[2], p.v.size[2]);
  check.index("fill", p.fill, "(B,)", {p.q.size[0]});
  return check.status();
}

Status validate(const LinearAttentionFoldParams& p) {
  Checker check("linear_attention_fold", p.pending_k, "pending_k");
  check.first("(slots, C, H, D)", {kAny, kAny, kAny, kAny});
  check.require(p.scale > 0, "scale", "a number > 0", p.scale);
  if (!check.ok()) return check.status();
  const int64_t slots = p.pending_k.size[0], heads = p.pending_k.size[2];
  const int64_t feature_dim = p.pending_k.size[3];
  check.require(feature_dim >= 1, "pending_k", "feature_dim >= 1", double(feature_dim));
  check_pending(check, p, slots, heads, feature_dim, kAny);
  if (!check.ok()) return check.status();
  const int64_t head_dim = last_size(p.pending_v);
  check.require(head_dim >= 1, "pending_v", "head_dim >= 1", double(head_dim));
  check.require(given(p.kv_state), "kv_state", "a state (slots, H, F, V)", 0);
  check_linear_state(check, "kv_state", p.kv_state, "k_state", p.k_state, slots, heads, feature_dim,
                     head_dim);
  const int64_t rows = given(p.state_indices) ? kAny : slots;
  check.index("fill", p.fill, "(B,)", {rows});
  if (check.ok() && given(p.state_indices)) {
    check.index("state_indices", p.state_indices, "(B,)", {p.fill.size[0]});
  }
  return check.status();
}

Status validate(const SlidingWindowParams& p) {
  Checker check("sliding_window_attention", p.q, "q");
  check_sliding_window(check, p);
  if (!check.ok()) return check.status();
  check.same("out", p.out, "(B, T, H, V)", Shape(p.q, last_size(p.q)));
  check.wide("lse", p.lse, "(B, T, H)", {p.q.size[0], p.q.size[1], p.q.size[2]});
  return check.status();
}

Status validate(const SlidingWindowBackwardParams& p) {
  Checker check("sliding_window_attention_backward", p.q, "q");
  check_sliding_window(check, p);
  if (!check.ok()) return check.status();
  const Shape like_q(p.q, last_size(p.q));
  check.same("out", p.out, "(B, T, H, V)", like_q);
  check.wide("lse", p.lse, "(B, T, H)", {p.q.size[0], p.q.size[1], p.q.size[2]});
  check.same("dout", p.dout, "(B, T, H, V)", like_q);
  check.same("dq", p.dq, "(B, T, H, V)", like_q);
  check.same("dk", p.dk, "(B, T, H, V)", like_q);
  check.same("dv", p.dv, "(B, T, H, V)", like_q);
  const int64_t n = given(p.cu_seqlens) ? p.cu_seqlens.size[0] - 1 : p.q.size[0];
  const auto caches = [&](const char* k_name, const TensorView& k, const char* v_name,
                          const TensorView& v) {
    check.together(given(k) ? v_name : k_name, k, v);
    if (!given(k)) return;
    check.same(k_name, k, "(N, W, H, V)", {n, p.window, p.q.size[2], p.q.size[3]});
    check.same(v_name, v, "(N, W, H, V)", {n, p.window, p.q.size[2], p.q.size[3]});
  };
  caches("dfinal_k_cache", p.dfinal_k_cache, "dfinal_v_cache", p.dfinal_v_cache);
  caches("dinitial_k_cache", p.dinitial_k_cache, "dinitial_v_cache", p.dinitial_v_cache);
  return check.status();
}

Status validate(const SlidingWindowDecodeParams& p) {
  Checker check("sliding_window_decode", p.q, "q");
  check.first("(B, H, V)", {kAny, kAny, kAny});
  if (!check.ok()) return check.status();
  const int64_t batch = p.q.size[0], heads = p.q.size[1], head_dim = p.q.size[2];
  check.require(head_dim >= 1, "q", "head_dim >= 1", double(head_dim));
  check.require(p.scale > 0, "scale", "a number > 0", p.scale);
  check.same("k", p.k, "(B, H, V)", {batch, heads, head_dim});
  check.same("v", p.v, "(B, H, V)", {batch, heads, head_dim});
  const int64_t slots = slot_count(check, p.state_indices, batch);
  check.same("k_cache", p.k_cache, "(slots, W, H, V)", {slots, kAny, heads, head_dim});
  if (!check.ok()) return check.status();
  const int64_t window = p.k_cache.size[1];
  check.require(window >= 1, "k_cache", "window >= 1", double(window));
  check.same("v_cache", p.v_cache, "(slots, W, H, V)",
             {p.k_cache.size[0], window, heads, head_dim});
  check.index("positions", p.positions, "(B,)", {batch});
  check.together(given(p.cos) ? "sin" : "cos", p.cos, p.sin);
  if (given(p.cos)) {
    check.wide("cos", p.cos, "(B, R)", {batch, kAny});
    if (!check.ok()) return check.status();
    const int64_t angles = p.cos.size[1];
    check.require(2 * angles <= head_dim, "cos", "2 R <= V", double(2 * angles));
    check.wide("sin", p.sin, "(B, R)", {batch, angles});
  }
  check.same("out", p.out, "(B, H, V)", {batch, heads, head_dim});
  return check.status();
}

Status validate(const ShortConvParams& p) {
  Checker check("short_conv", p.x, "x");
  check_short_conv(check, p);
  if (check.ok()) check.same("out", p.out, "(B, T, C)", Shape(p.x, last_size(p.x)));
  return check.status();
}

Status validate(const ShortConvBackwardParams& p) {
  Checker check("short_conv_backward", p.x, "x");
  check_short_conv(check, p);
  if (!check.ok()) return check.status();
  const int64_t channels = last_size(p.x);
  const Shape like_x(p.x, channels);
  check.same("dout", p.dout, "(B, T, C)", like_x);
  check.same("dx", p.dx, "(B, T, C)", like_x);
  check.same("dweight", p.dweight, "(C, K)", {channels, last_size(p.weight)});
  if (given(p.dbias)) check.same("dbias", p.dbias, "(C,)", {channels});
  if (given(p.dgate)) check.same("dgate", p.dgate, "(B, T, C)", like_x);
  const int64_t n = given(p.cu_seqlens) ? p.cu_seqlens.size[0] - 1 : p.x.size[0];
  const Shape state = {n, channels, last_size(p.weight) - 1};
  if (given(p.dfinal_state)) check.same("dfinal_state", p.dfinal_state, "(N, C, K-1)", state);
  if (given(p.dinitial_state)) {
    check.same("dinitial_state", p.dinitial_state, "(N, C, K-1)", state);
  }
  return check.status();
}

Status validate(const ShortConvDecodeParams& p) {
  Checker check("short_conv_decode", p.x, "x");
  check.first("(B, C)", {kAny, kAny});
  if (!check.ok()) return check.status();
  const int64_t batch = p.x.size[0], channels = p.x.size[1];
  check_conv_weight(check, p.weight, p.bias, channels);
  if (!check.ok()) return check.status();
  if (given(p.gate)) check.same("gate", p.gate, "(B, C)", {batch, channels});
  const int64_t slots = slot_count(check, p.state_indices, batch);
  check.same("conv_state", p.conv_state, "(slots, C, K-1)",
             {slots, channels, last_size(p.weight) - 1});
  check.same("out", p.out, "(B, C)", {batch, channels});
  return check.status();
}

}  // namespace based
