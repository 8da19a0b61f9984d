// What the three short-convolution kernels share. Channels are independent: a task takes up to
// kChannels of them, tokens are rows of that many values, and every loop runs over channels.
#pragma once

#include "element.h"
#include "exp.h"
#include "simd.h"
#include "tasks.h"

namespace based::cpu::BASED_ISA {

constexpr int kMaxTaps = 8;
constexpr int64_t kChannels = 512;  // of a task: its rows stay in the L1 and L2 caches
constexpr int64_t kTokens = 256;  // of a task: fixed, so that partial sums do not depend on threads

inline int64_t channel_blocks(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

// Channels [begin, begin + count).
struct ChannelRange {
  int64_t begin, count;
};

inline ChannelRange channel_range(int64_t block, int64_t channels) {
  const int64_t begin = block * kChannels;
  return {begin, channels - begin < kChannels ? channels - begin : kChannels};
}

template <class T>
void fill(T* row, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

template <class T>
constexpr bool is_stored_as(DType dtype) {
  return sizeof(T) == sizeof(double) || dtype == DType::kFloat32;
}

// n values at `offset` of a view: in place where they are stored as T, else converted into buffer.
template <class T>
const T* read_row(const TensorView& view, int64_t offset, int64_t n, T* buffer) {
  if (is_stored_as<T>(view.dtype)) return static_cast<const T*>(view.data) + offset;
  load(buffer, view.data, view.dtype, offset, n);
  return buffer;
}

// Where to compute n values that write_row then puts at `offset`: their place itself, or buffer.
template <class T>
T* target_row(const TensorView& view, int64_t offset, T* buffer) {
  return is_stored_as<T>(view.dtype) ? static_cast<T*>(view.data) + offset : buffer;
}

template <class T>
void write_row(const TensorView& view, int64_t offset, int64_t n, const T* row) {
  if (!is_stored_as<T>(view.dtype)) store(view.data, view.dtype, offset, row, n);
}

// A (channels, width) block of a tensor at `offset`, transposed: rows (width, kChannels).
// staging holds kChannels * width values.
template <class T>
void load_columns(T* rows, const TensorView& view, int64_t offset, int64_t stride, int64_t channels,
                  int64_t width, T* staging) {
  if (stride == width) {
    load(staging, view.data, view.dtype, offset, channels * width);
  } else {
    for (int64_t c = 0; c < channels; ++c) {
      load(staging + c * width, view.data, view.dtype, offset + c * stride, width);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t c = 0; c < channels; ++c) rows[i * kChannels + c] = staging[c * width + i];
  }
}

// The way back, from rows anywhere.
template <class T>
void store_columns(const TensorView& view, int64_t offset, int64_t stride, int64_t channels,
                   int64_t width, const T* const* rows, T* staging) {
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t c = 0; c < channels; ++c) staging[c * width + i] = rows[i][c];
  }
  if (stride == width) return store(view.data, view.dtype, offset, staging, channels * width);
  for (int64_t c = 0; c < channels; ++c) {
    store(view.data, view.dtype, offset + c * stride, staging + c * width, width);
  }
}

template <class T>
void load_bias(T* row, const TensorView& bias, ChannelRange channels) {
  if (bias.rank < 0) return fill(row, T(0), channels.count);
  load(row, bias.data, bias.dtype, channels.begin, channels.count);
}

// out = bias + sum_j weight_j rows_j, n channels; kTaps counts up to taps.
template <class T, int kTaps = 2>
void convolve(int taps, T* __restrict out, const T* const* rows, const T* weight, const T* bias,
              int64_t n) {
  if constexpr (kTaps < kMaxTaps) {
    if (taps > kTaps) return convolve<T, kTaps + 1>(taps, out, rows, weight, bias, n);
  }
  const T* row[kTaps];
  for (int j = 0; j < kTaps; ++j) row[j] = rows[j];
  for (int64_t i = 0; i < n; ++i) {
    T sum = bias[i];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) sum += weight[j * kChannels + i] * row[j][i];
    out[i] = sum;
  }
}

// out = act(convolved) * gate
template <class T>
void finish_row(Activation activation, const T* __restrict convolved, const T* __restrict gate,
                T* __restrict out, int64_t n) {
  if (activation == Activation::kSilu) {
    for (int64_t i = 0; i < n; ++i) out[i] = convolved[i] / (1 + exp_fast(-convolved[i])) * gate[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = convolved[i] * gate[i];
  }
}

// One task: tokens [first, last), counted over all batch rows, times a range of channels.
struct TokenBlock {
  int64_t task, first, last;
  ChannelRange channels;
};

inline int64_t token_blocks(const ShortConvParams& p) {
  return (p.x.size[0] * p.x.size[1] + kTokens - 1) / kTokens;
}

template <class T, class BodyFn>
bool for_each_token_block(const ShortConvParams& p, ParallelFor parallel, int64_t elements,
                          const BodyFn& body) {
  const int64_t tokens = p.x.size[0] * p.x.size[1], C = p.x.size[2], blocks = channel_blocks(C);
  return for_each_task<T>(
      parallel, token_blocks(p) * blocks, elements, [&](int64_t task, T* scratch) {
        const int64_t first = task / blocks * kTokens;
        const int64_t last = tokens - first < kTokens ? tokens : first + kTokens;
        body(TokenBlock{task, first, last, channel_range(task % blocks, C)}, scratch);
      });
}

// body(n, sequence, begin, end) for every run of tokens of one sequence in a block; begin and end
// count within the sequence's batch row.
template <class BodyFn>
void for_each_segment(const ShortConvParams& p, const TokenBlock& block, const BodyFn& body) {
  const int64_t seqlen = p.x.size[1];
  const bool packed = p.cu_seqlens.rank >= 0;
  int64_t n = packed ? 0 : block.first / seqlen;
  if (packed) {  // the last sequence that begins at or before the block
    for (int64_t above = p.cu_seqlens.size[0] - 1; above - n > 1;) {
      const int64_t middle = n + (above - n) / 2;
      (load_index(p.cu_seqlens, middle) <= block.first ? n : above) = middle;
    }
  }
  for (int64_t first = block.first; first < block.last; ++n) {
    const Sequence seq = sequence(p.cu_seqlens, n, seqlen);
    const int64_t row = packed ? 0 : n * seqlen;
    const int64_t end = seq.end < block.last - row ? seq.end : block.last - row;
    if (first - row < end) body(n, seq, first - row, end);
    first = row + end;
  }
}

// The convolution over a range of channels, token by token. `rows` are the K inputs that the
// current token sees, oldest first: x, preceded by the initial state, or by zeros.
template <class T>
class Convolution {
 public:
  static constexpr int64_t kScratch = (4 * kMaxTaps + 2) * kChannels;
  const ChannelRange channels;
  const int taps;
  const T* rows[kMaxTaps];
  T *const weight, *const staging, *const ones;

  Convolution(const ShortConvParams& params, ChannelRange range, T* scratch)
      : channels(range),
        taps(static_cast<int>(params.weight.size[1])),
        weight(scratch),
        staging(weight + kMaxTaps * kChannels),
        ones(staging + kMaxTaps * kChannels),
        p(params),
        state(ones + kChannels),
        inputs(state + kMaxTaps * kChannels),
        bias(inputs + kMaxTaps * kChannels) {
    load_columns(weight, p.weight, channels.begin * p.weight.stride[0], p.weight.stride[0],
                 channels.count, taps, staging);
    load_bias(bias, p.bias, channels);
    fill(ones, T(1), channels.count);
  }

  // Makes t the next token of sequence n.
  void start(int64_t n, const Sequence& seq, int64_t t) {
    const int history = taps - 1;
    sequence = seq;
    if (t - history < seq.begin) load_state(state, p.initial_state, n);
    for (int i = 0; i < history; ++i) rows[i + 1] = input(t - history + i);
  }

  void advance(int64_t t) {
    for (int j = 1; j < taps; ++j) rows[j - 1] = rows[j];
    rows[taps - 1] = input(t);
  }

  void evaluate(T* out) const { convolve(taps, out, rows, weight, bias, channels.count); }

  // The gate at token t, 1 when there is none.
  const T* gate(int64_t t, T* buffer) const {
    return p.gate.rank < 0 ? ones : read_row(p.gate, offset(p.gate, t), channels.count, buffer);
  }

  // Element offset of the channels at token t of the current sequence.
  int64_t offset(const TensorView& view, int64_t t) const {
    return sequence.batch * view.stride[0] + t * view.stride[1] + channels.begin;
  }

  // Rows (K-1, kChannels) of a state (N, C, K-1) of sequence n, 0 when it is not given.
  void load_state(T* target, const TensorView& view, int64_t n) const {
    if (view.rank < 0) return fill(target, T(0), (taps - 1) * kChannels);
    load_columns(target, view, n * view.stride[0] + channels.begin * view.stride[1], view.stride[1],
                 channels.count, taps - 1, staging);
  }

  void store_state(const TensorView& view, int64_t n, const T* const* source) const {
    store_columns(view, n * view.stride[0] + channels.begin * view.stride[1], view.stride[1],
                  channels.count, taps - 1, source, staging);
  }

 private:
  const T* input(int64_t t) {
    if (t < sequence.begin) return state + (t - sequence.begin + taps - 1) * kChannels;
    return read_row(p.x, offset(p.x, t), channels.count, inputs + t % taps * kChannels);
  }

  const ShortConvParams& p;
  T *const state, *const inputs, *const bias;
  Sequence sequence{};
};

}  // namespace based::cpu::BASED_ISA
