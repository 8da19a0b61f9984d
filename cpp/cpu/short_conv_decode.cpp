// Short gated convolution, one token. One task is kRows rows times kChannels channels.
#include "short_conv.h"

namespace based::cpu::BASED_ISA {
namespace {

constexpr int64_t kRows = 8;  // share the weights that a task loads

template <class T>
bool decode(const ShortConvDecodeParams& p, ParallelFor parallel) {
  const int64_t B = p.x.size[0], C = p.x.size[1], blocks = channel_blocks(C);
  const int taps = static_cast<int>(p.weight.size[1]), history = taps - 1;
  const TensorView& states = p.conv_state;
  constexpr int64_t kScratch = (3 * kMaxTaps + 6) * kChannels;
  const int64_t tasks = (B + kRows - 1) / kRows * blocks;
  return for_each_task<T>(parallel, tasks, kScratch, [&](int64_t task, T* scratch) {
    T *weight = scratch, *state = weight + kMaxTaps * kChannels;
    T *staging = state + kMaxTaps * kChannels, *bias = staging + kMaxTaps * kChannels;
    T *x = bias + kChannels, *gate = x + kChannels, *ones = gate + kChannels;
    T *convolved = ones + kChannels, *out = convolved + kChannels;
    const ChannelRange channels = channel_range(task % blocks, C);
    const int64_t c0 = channels.begin, n = channels.count;
    load_columns(weight, p.weight, c0 * p.weight.stride[0], p.weight.stride[0], n, taps, staging);
    load_bias(bias, p.bias, channels);
    fill(ones, T(1), n);

    const int64_t first = task / blocks * kRows, last = B - first < kRows ? B : first + kRows;
    for (int64_t b = first; b < last; ++b) {
      const int64_t slot = slot_of(p.state_indices, b), out_offset = b * p.out.stride[0] + c0;
      if (slot < 0) {
        fill(out, T(0), n);
        store(p.out.data, p.out.dtype, out_offset, out, n);
        continue;
      }
      const int64_t state_offset = slot * states.stride[0] + c0 * states.stride[1];
      load_columns(state, states, state_offset, states.stride[1], n, history, staging);
      const T* rows[kMaxTaps];
      for (int i = 0; i < history; ++i) rows[i] = state + i * kChannels;
      rows[history] = read_row(p.x, b * p.x.stride[0] + c0, n, x);
      convolve(taps, convolved, rows, weight, bias, n);
      const T* gate_row =
          p.gate.rank < 0 ? ones : read_row(p.gate, b * p.gate.stride[0] + c0, n, gate);
      finish_row(p.activation, convolved, gate_row, out, n);
      store(p.out.data, p.out.dtype, out_offset, out, n);
      store_columns(states, state_offset, states.stride[1], n, history, rows + 1, staging);
    }
  });
}

}  // namespace

bool short_conv_decode(const ShortConvDecodeParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? decode<double>(p, parallel) : decode<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
