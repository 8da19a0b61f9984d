// One plain params struct per op. A backward extends its forward; what the backward does not read
// of the forward (outputs, final states) stays not given.
//
// B batch, T seqlen, H heads, D feature_dim, F expanded_dim, V head_dim, W window, C channels,
// K taps, N sequences: B, or the number of packed sequences when cu_seqlens (N+1,) is given (B =
// 1). Element types: float32, bfloat16, float16, and float64 on the CPU; linear-attention states
// and lse are float32 (float64 for float64 inputs). Index tensors are int32 or int64. Any stride on
// leading dimensions, the last one contiguous.
#pragma once

#include "based/types.h"

namespace based {

// Rows of the 2nd-order Taylor map of a feature_dim-wide vector.
constexpr int64_t expanded_dim(int64_t feature_dim) {
  return 1 + feature_dim + feature_dim * (feature_dim + 1) / 2;
}

// phi(sqrt(scale) x) in rotation order: 1; x_j; x_j^2/sqrt(2); x_j x_{(j+r) mod D} for r = 1..D/2.
struct TaylorFeatureMapParams {
  TensorView x;    // (..., D), up to 4 dimensions
  TensorView out;  // (..., F)
  double scale = 1.0;
};

struct TaylorFeatureMapBackwardParams : TaylorFeatureMapParams {
  TensorView dout;  // (..., F)
  TensorView dx;    // (..., D)
};

// out_t = sum_{s<=t} w_ts v_s / sum_{s<=t} w_ts, w = 1 + s + s^2/2, s = scale <q_t, k_s>.
struct LinearAttentionParams {
  TensorView q, k;                               // (B, T, H, D)
  TensorView v;                                  // (B, T, H, V)
  TensorView cu_seqlens;                         // optional (N+1,)
  TensorView initial_kv_state, initial_k_state;  // optional (N, H, F, V), (N, H, F)
  TensorView out;                                // (B, T, H, V)
  TensorView final_kv_state, final_k_state;      // optional (N, H, F, V), (N, H, F)
  double scale = 1.0;
  bool normalize = true;
};

struct LinearAttentionBackwardParams : LinearAttentionParams {
  TensorView dout;                                 // (B, T, H, V)
  TensorView dfinal_kv_state, dfinal_k_state;      // optional, as the final states
  TensorView dq, dk, dv;                           // as q, k, v
  TensorView dinitial_kv_state, dinitial_k_state;  // optional, as the initial states
};

// One token per row; states are read and updated in place.
struct LinearAttentionDecodeParams {
  TensorView q, k;           // (B, H, D)
  TensorView v;              // (B, H, V)
  TensorView kv_state;       // (slots, H, F, V)
  TensorView k_state;        // (slots, H, F)
  TensorView state_indices;  // optional (B,): slot of each row, -1 skips the row (output 0)
  TensorView out;            // (B, H, V)
  double scale = 1.0;
  bool normalize = true;
};

// Decode that writes the state every C-th token only: a row's last tokens wait in its ring of C,
// and the state together with them is the row's state. With fill + 1 < C the token joins the ring
// at place fill; with fill + 1 = C all C tokens go into the state, and the ring is empty.
struct LinearAttentionDecodeDeferredParams : LinearAttentionDecodeParams {
  TensorView pending_k;  // (slots, C, H, D)
  TensorView pending_v;  // (slots, C, H, V)
  TensorView fill;       // (B,): tokens that wait in the ring before this one, 0..C-1
};

// Adds the tokens that wait in the rings to the states: what they hold is then the plain form.
struct LinearAttentionFoldParams {
  TensorView kv_state;       // (slots, H, F, V)
  TensorView k_state;        // (slots, H, F)
  TensorView pending_k;      // (slots, C, H, D)
  TensorView pending_v;      // (slots, C, H, V)
  TensorView fill;           // (B,)
  TensorView state_indices;  // optional (B,)
  double scale = 1.0;
};

// softmax attention over the keys s with 0 <= t - s < window. The key of absolute position p lives
// in slot p mod W of the ring; positions counts the tokens a sequence has seen.
struct SlidingWindowParams {
  TensorView q, k, v;                           // (B, T, H, V)
  TensorView cu_seqlens;                        // optional (N+1,)
  TensorView initial_k_cache, initial_v_cache;  // optional (N, W, H, V)
  TensorView initial_positions;                 // optional (N,)
  TensorView out;                               // (B, T, H, V)
  TensorView lse;                               // (B, T, H): log sum exp of the scaled scores
  TensorView final_k_cache, final_v_cache;      // optional (N, W, H, V)
  TensorView final_positions;                   // optional (N,)
  int64_t window = 0;
  double scale = 1.0;
};

struct SlidingWindowBackwardParams : SlidingWindowParams {
  TensorView dout;                                // (B, T, H, V)
  TensorView dfinal_k_cache, dfinal_v_cache;      // optional, as the final caches
  TensorView dq, dk, dv;                          // as q, k, v
  TensorView dinitial_k_cache, dinitial_v_cache;  // optional, as the initial caches
};

// One token per row: k and v go to slot positions mod W, then q attends to what the ring holds.
struct SlidingWindowDecodeParams {
  TensorView q, k, v;           // (B, H, V)
  TensorView k_cache, v_cache;  // (slots, W, H, V), updated in place
  TensorView positions;         // (B,): tokens the row has seen before this one
  TensorView state_indices;     // optional (B,)
  TensorView cos, sin;          // optional (B, R): rotates q and k, dim j < R with dim j + R
  TensorView out;               // (B, H, V)
  double scale = 1.0;
};

enum class Activation : uint8_t { kNone, kSilu };

// out_t = act(sum_j weight_j x_{t-K+1+j} + bias) * gate_t, channel by channel.
struct ShortConvParams {
  TensorView x;              // (B, T, C)
  TensorView weight;         // (C, K), K = 2..8; the last tap meets the current token
  TensorView bias;           // optional (C,)
  TensorView gate;           // optional (B, T, C)
  TensorView initial_state;  // optional (N, C, K-1): the last K-1 inputs, oldest first
  TensorView cu_seqlens;     // optional (N+1,)
  TensorView out;            // (B, T, C)
  TensorView final_state;    // optional (N, C, K-1)
  Activation activation = Activation::kNone;
};

struct ShortConvBackwardParams : ShortConvParams {
  TensorView dout;            // (B, T, C)
  TensorView dfinal_state;    // optional (N, C, K-1)
  TensorView dx;              // (B, T, C)
  TensorView dweight;         // (C, K)
  TensorView dbias, dgate;    // optional, as bias, gate
  TensorView dinitial_state;  // optional (N, C, K-1)
};

struct ShortConvDecodeParams {
  TensorView x;              // (B, C)
  TensorView weight;         // (C, K)
  TensorView bias, gate;     // optional (C,), (B, C)
  TensorView conv_state;     // (slots, C, K-1), updated in place
  TensorView state_indices;  // optional (B,)
  TensorView out;            // (B, C)
  Activation activation = Activation::kNone;
};

// out = x weight^T + bias for the few rows of a decode step, or with swiglu value * silu(gate) of
// that product's columns (value, gate). bfloat16 and float16, on a GPU of compute capability 9.0.
constexpr int64_t kSkinnyMaxRows = 64;
struct SkinnyLinearParams {
  TensorView x;       // (N, K), N <= 64; rows of x and weight start at multiples of 16 bytes
  TensorView weight;  // (M, K)
  TensorView bias;    // optional (M,), not with swiglu
  TensorView out;     // (N, M), or (N, M/2)
  bool swiglu = false;
};

// What lies between the token mixers of two layers, for the few rows of a decode step:
//   x += mixed out_weight^T + out_bias
//   x += (value * silu(gate)) fc2^T, (value, gate) = rms_norm(x, norm) fc1^T
//   out = rms_norm(x, next_norm) next_weight^T + next_bias
// and with conv_weight, that product being (u, gate), what ShortConvDecodeParams says with silu:
//   out = silu(sum_j conv_weight_j u_{t-K+1+j}) * gate
// bfloat16 but for x, on a GPU of compute capability 9.0.
constexpr int64_t kDecodeBlockMaxRows = 128;
constexpr int64_t kDecodeBlockCounters = 8;
constexpr int64_t kDecodeBlockMaxTaps = 4;
constexpr int64_t kDecodeMaxBlocks = 6;
struct DecodeBlockWeights {
  TensorView out_weight;   // (d, K); rows of the four matrices start at multiples of 16 bytes
  TensorView out_bias;     // optional (d,)
  TensorView norm;         // (d,)
  TensorView fc1;          // (2m, d): rows of values, then those of gates
  TensorView fc2;          // (d, m)
  TensorView next_norm;    // (d,)
  TensorView next_weight;  // (M, d)
  TensorView next_bias;    // optional (M,)
  TensorView conv_weight;  // optional (C, taps), 2..4 taps, M = 2C: rows of u, then of gates
  TensorView conv_state;   // (slots, C, taps-1), updated in place; every slot contiguous
};
// Several blocks, one after the other, if a convolution is all that lies between two: each but the
// last has one, and what it gives is the next one's mixed.
struct DecodeBlockParams {
  TensorView mixed;  // (N, K), N <= 128; rows start at multiples of 16 bytes
  TensorView x;      // (N, d) float32
  DecodeBlockWeights blocks[kDecodeMaxBlocks];
  int64_t count = 1;    // of blocks
  TensorView counters;  // (8,) int32, zero before and after; not shared by calls that may overlap
  TensorView state_indices;  // optional (N,), of all convolutions
  TensorView x_out;          // (N, d) float32
  TensorView out;            // of the last block: (N, M), or (N, C)
  double eps = 1e-5;

  const char* op() const { return count == 1 ? "decode_block" : "decode_blocks"; }
};

}  // namespace based
