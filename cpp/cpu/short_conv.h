// What the three short-convolution kernels share. Channels are independent: a task takes up to
// kChannels of them, tokens are rows of that many values, and every loop runs over channels.
//
// The kernels are bound by memory. A task walks whole rows in order, strip by strip of kStrip
// channels, so that its reads and writes advance together; float32 and float64 rows are read and
// written in place. Matrices in scratch are (rows, ld), one column per channel of the task.
#pragma once

#include "element.h"
#include "exp.h"
#include "tasks.h"
#include "tiles.h"

namespace based::cpu::BASED_ISA {

constexpr int kMaxTaps = 8;
constexpr int64_t kChannels = 2048;  // of a task
constexpr int64_t kTokens = 256;     // of a task: fixed, so that sums do not depend on threads
constexpr int64_t kStrip = 128;

// Channels [begin, begin + count).
struct ChannelRange {
  int64_t begin, count;
};

inline int64_t channel_blocks(int64_t channels) { return (channels + kChannels - 1) / kChannels; }

inline ChannelRange channel_range(int64_t block, int64_t channels) {
  const int64_t begin = block * kChannels;
  return {begin, channels - begin < kChannels ? channels - begin : kChannels};
}

// ld of the widest task: no power of two, which would put every row into the same cache sets.
inline int64_t scratch_stride(int64_t channels) {
  return (channels < kChannels ? channels : kChannels) / 16 * 16 + 32;
}

// body(c, m) for every strip [c, c + m) of n channels.
template <class BodyFn>
void for_each_strip(int64_t n, const BodyFn& body) {
  for (int64_t c = 0; c < n; c += kStrip) body(c, n - c < kStrip ? n - c : kStrip);
}

template <class T>
void fill(T* row, T value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

template <class T>
constexpr bool is_stored_as(DType dtype) {
  return sizeof(T) == sizeof(double) || dtype == DType::kFloat32;
}

// load and store are large when inlined, and here they are called in many places.
template <class T>
__attribute__((noinline)) void load_row(T* row, const TensorView& view, int64_t offset, int64_t n) {
  load(row, view.data, view.dtype, offset, n);
}

template <class T>
__attribute__((noinline)) void store_row(const TensorView& view, int64_t offset, const T* row,
                                         int64_t n) {
  store(view.data, view.dtype, offset, row, n);
}

// n values at `offset` of a view: in place where they are stored as T, else converted into buffer.
template <class T>
const T* read_row(const TensorView& view, int64_t offset, int64_t n, T* buffer) {
  if (is_stored_as<T>(view.dtype)) return static_cast<const T*>(view.data) + offset;
  load_row(buffer, view, offset, n);
  return buffer;
}

// Where to compute values that write_row then puts at `offset`: in place, or in buffer.
template <class T>
T* target_row(const TensorView& view, int64_t offset, T* buffer) {
  return is_stored_as<T>(view.dtype) ? static_cast<T*>(view.data) + offset : buffer;
}

template <class T>
void write_row(const TensorView& view, int64_t offset, int64_t n, const T* row) {
  if (!is_stored_as<T>(view.dtype)) store_row(view, offset, row, n);
}

// matrix (width, ld) <- n rows of `width` values at `offset` of a view, `stride` apart, transposed:
// weights and states. staging has room for all of them.
template <class T>
void load_columns(T* matrix, int64_t ld, const TensorView& view, int64_t offset, int64_t stride,
                  int64_t n, int64_t width, T* staging) {
  if (stride == width) {
    load_row(staging, view, offset, n * width);
  } else {
    for (int64_t c = 0; c < n; ++c) {
      load_row(staging + c * width, view, offset + c * stride, width);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t c = 0; c < n; ++c) matrix[i * ld + c] = staging[c * width + i];
  }
}

// The way back; the `width` rows may lie anywhere.
template <class T>
void store_columns(const T* const* rows, const TensorView& view, int64_t offset, int64_t stride,
                   int64_t n, int64_t width, T* staging) {
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t c = 0; c < n; ++c) staging[c * width + i] = rows[i][c];
  }
  if (stride == width) return store_row(view, offset, staging, n * width);
  for (int64_t c = 0; c < n; ++c) {
    store_row(view, offset + c * stride, staging + c * width, width);
  }
}

template <class T>
void load_bias(T* row, const TensorView& bias, ChannelRange channels) {
  if (bias.rank < 0) return fill(row, T(0), channels.count);
  load_row(row, bias, channels.begin, channels.count);
}

template <class T>
T sigmoid(T x) {
  return 1 / (1 + exp_fast(-x));
}

// finish(i, base_i + sum_j weight_j rows_j) for the channels [c, c + n), i from 0; weight (taps,
// ld). finish writes to memory that nothing here reads. kTaps counts up to taps.
template <class T, int kTaps = 2, class FinishFn>
__attribute__((noinline)) void convolve(int taps, const T* const* rows, const T* weight, int64_t ld,
                                        const T* base, int64_t c, int64_t n,
                                        const FinishFn& finish) {
  if constexpr (kTaps < kMaxTaps) {
    if (taps > kTaps) {
      return convolve<T, kTaps + 1>(taps, rows, weight, ld, base, c, n, finish);
    }
  }
  const T *row[kTaps], *factor[kTaps];
  for (int j = 0; j < kTaps; ++j) row[j] = rows[j] + c, factor[j] = weight + j * ld + c;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T sum = base[i];
#pragma GCC unroll 8
    for (int j = 0; j < kTaps; ++j) sum += factor[j][i] * row[j][i];
    finish(i, sum);
  }
}

// body(finish) with the finish of convolve that gives out = act(.) * gate.
template <class T, class BodyFn>
void with_gated_activation(Activation activation, const T* gate, T* out, const BodyFn& body) {
  if (activation == Activation::kSilu) {
    body([=](int64_t i, T sum) { out[i] = sum * sigmoid(sum) * gate[i]; });
  } else {
    body([=](int64_t i, T sum) { out[i] = sum * gate[i]; });
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

// body(n, sequence, channels, scratch) for every sequence and range of channels.
template <class T, class BodyFn>
bool for_each_sequence(const ShortConvParams& p, ParallelFor parallel, int64_t elements,
                       const BodyFn& body) {
  const int64_t C = p.x.size[2], blocks = channel_blocks(C);
  const int64_t tasks = sequence_count(p.cu_seqlens, p.x.size[0]) * blocks;
  return for_each_task<T>(parallel, tasks, elements, [&](int64_t task, T* scratch) {
    const int64_t n = task / blocks;
    body(n, sequence(p.cu_seqlens, n, p.x.size[1]), channel_range(task % blocks, C), scratch);
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

// The convolution over a range of channels, token by token.
template <class T>
class Convolution {
 public:
  const ChannelRange channels;
  const int taps;
  const int64_t ld;
  const T* rows[kMaxTaps];  // the K inputs that the current token sees, oldest first
  T *weight, *staging;      // (K, ld); room for load_columns and store_columns

  Convolution(const ShortConvParams& params, ChannelRange range, Arena<T>& arena)
      : channels(range),
        taps(static_cast<int>(params.weight.size[1])),
        ld(scratch_stride(params.x.size[2])),
        p(params) {
    weight = arena.take(taps * ld), staging = arena.take(taps * ld);
    state = arena.take(taps * ld), inputs = arena.take(taps * ld);
    bias = arena.take(ld), ones = arena.take(kStrip);
    if (arena.base == nullptr) return;
    load_columns(weight, ld, p.weight, channels.begin * p.weight.stride[0], p.weight.stride[0],
                 channels.count, taps, staging);
    load_bias(bias, p.bias, channels);
    fill(ones, T(1), kStrip);
  }

  // Makes t the next token of sequence n.
  void start(int64_t n, const Sequence& seq, int64_t t) {
    const int history = taps - 1;
    sequence = seq;
    if (t - history < seq.begin) load_state(state, p.initial_state, n);
    for (int i = 0; i < history; ++i) {
      const int64_t s = t - history + i;
      rows[i + 1] = s < seq.begin ? state + (s - seq.begin + history) * ld
                                  : read_row(p.x, offset(p.x, s), channels.count, input(s));
    }
  }

  void advance(int64_t t) {
    token = t;
    for (int j = 1; j < taps; ++j) rows[j - 1] = rows[j];
    rows[taps - 1] = target_row(p.x, offset(p.x, t), input(t));
  }

  // convolve at the current token; strips [c, c + n) come in order.
  template <class FinishFn>
  void evaluate(int64_t c, int64_t n, const FinishFn& finish) {
    read_row(p.x, offset(p.x, token) + c, n, input(token) + c);
    convolve(taps, rows, weight, ld, bias + c, c, n, finish);
  }

  // The gate of the current token, 1 when there is none.
  const T* gate(int64_t c, int64_t n, T* buffer) const {
    return p.gate.rank < 0 ? ones : read_row(p.gate, offset(p.gate, token) + c, n, buffer);
  }

  // Element offset of the channels at token t of the current sequence.
  int64_t offset(const TensorView& view, int64_t t) const {
    return sequence.batch * view.stride[0] + t * view.stride[1] + channels.begin;
  }

  // matrix (K-1, ld) <- a state (N, C, K-1) of sequence n, 0 when it is not given.
  void load_state(T* matrix, const TensorView& view, int64_t n) const {
    if (view.rank < 0) return fill(matrix, T(0), (taps - 1) * ld);
    load_columns(matrix, ld, view, n * view.stride[0] + channels.begin * view.stride[1],
                 view.stride[1], channels.count, taps - 1, staging);
  }

  void store_state(const T* const* matrix_rows, const TensorView& view, int64_t n) const {
    store_columns(matrix_rows, view, n * view.stride[0] + channels.begin * view.stride[1],
                  view.stride[1], channels.count, taps - 1, staging);
  }

 private:
  // Where input t goes when it is converted.
  T* input(int64_t t) const { return inputs + t % taps * ld; }

  const ShortConvParams& p;
  T *state, *inputs, *bias, *ones;
  Sequence sequence{};
  int64_t token = 0;
};

}  // namespace based::cpu::BASED_ISA
