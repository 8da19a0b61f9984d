// Short gated convolution, one token. One task is kRows rows times kChannels channels.
#include "short_conv.h"

namespace based::cpu::BASED_ISA {
namespace {

constexpr int64_t kRows = 8;  // share the weights that a task loads

template <class T>
class Decode {
 public:
  Decode(const ShortConvDecodeParams& params, ChannelRange range, Arena<T>& arena)
      : p(params),
        channels(range),
        taps(static_cast<int>(p.weight.size[1])),
        ld(scratch_stride(p.x.size[1])) {
    weight = arena.take(taps * ld), state = arena.take(taps * ld), staging = arena.take(taps * ld);
    bias = arena.take(ld), x = arena.take(ld), gate = arena.take(ld), out = arena.take(ld);
    if (arena.base == nullptr) return;
    load_columns(weight, ld, p.weight, channels.begin * p.weight.stride[0], p.weight.stride[0],
                 channels.count, taps, staging);
    load_bias(bias, p.bias, channels);
    if (p.gate.rank < 0) fill(gate, T(1), channels.count);
  }

  void row(int64_t b) const {
    const int64_t n = channels.count, slot = slot_of(p.state_indices, b), history = taps - 1;
    if (slot < 0) {
      fill(out, T(0), n);
      return store_row(p.out, offset(p.out, b), out, n);
    }
    const TensorView& states = p.conv_state;
    const int64_t at = slot * states.stride[0] + channels.begin * states.stride[1];
    load_columns(state, ld, states, at, states.stride[1], n, history, staging);
    load_row(x, p.x, offset(p.x, b), n);
    const T* rows[kMaxTaps];
    for (int i = 0; i < history; ++i) rows[i] = state + i * ld;
    rows[history] = x;
    if (p.gate.rank >= 0) load_row(gate, p.gate, offset(p.gate, b), n);
    with_gated_activation(p.activation, gate, out, [&](const auto& finish) {
      convolve(taps, rows, weight, ld, bias, 0, n, finish);
    });
    store_row(p.out, offset(p.out, b), out, n);
    store_columns(rows + 1, states, at, states.stride[1], n, history, staging);
  }

 private:
  int64_t offset(const TensorView& view, int64_t b) const {
    return b * view.stride[0] + channels.begin;
  }

  const ShortConvDecodeParams& p;
  const ChannelRange channels;
  const int taps;
  const int64_t ld;
  T *weight, *state, *staging, *bias, *x, *gate, *out;
};

template <class T>
bool decode(const ShortConvDecodeParams& p, ParallelFor parallel) {
  const int64_t B = p.x.size[0], C = p.x.size[1], blocks = channel_blocks(C);
  Arena<T> size{nullptr};
  Decode<T>(p, {0, 0}, size);
  const int64_t tasks = (B + kRows - 1) / kRows * blocks;
  return for_each_task<T>(parallel, tasks, size.used, [&](int64_t task, T* scratch) {
    Arena<T> arena{scratch};
    const Decode<T> rows(p, channel_range(task % blocks, C), arena);
    const int64_t first = task / blocks * kRows;
    for (int64_t b = first; b < first + kRows && b < B; ++b) rows.row(b);
  });
}

}  // namespace

bool short_conv_decode(const ShortConvDecodeParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? decode<double>(p, parallel) : decode<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
