// Short gated convolution, forward. One task is kTokens tokens of the batch times kChannels
// channels:
//   out_t = act(sum_j weight_j x_{t-K+1+j} + bias) * gate_t
// x and gate are read once, out is written once.
#include "short_conv.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
class Forward {
 public:
  Convolution<T> conv;

  Forward(const ShortConvParams& params, ChannelRange channels, Arena<T>& arena)
      : conv(params, channels, arena), p(params) {
    gate = arena.take(kStrip), out = arena.take(kStrip);
  }

  void tokens(int64_t n, const Sequence& seq, int64_t begin, int64_t end) {
    conv.start(n, seq, begin);
    for (int64_t t = begin; t < end; ++t) {
      conv.advance(t);
      for_each_strip(conv.channels.count, [&](int64_t c, int64_t m) {
        const int64_t offset = conv.offset(p.out, t) + c;
        T* row = target_row(p.out, offset, out);
        with_gated_activation(p.activation, conv.gate(c, m, gate), row,
                              [&](const auto& finish) { conv.evaluate(c, m, finish); });
        write_row(p.out, offset, m, row);
      });
    }
  }

  // After the last token, the inputs it saw but the oldest.
  void final_state(int64_t n, const Sequence& seq) {
    conv.start(n, seq, seq.end);
    conv.store_state(conv.rows + 1, p.final_state, n);
  }

 private:
  const ShortConvParams& p;
  T *gate, *out;
};

template <class T>
bool forward(const ShortConvParams& p, ParallelFor parallel) {
  const auto run = [&](const TokenBlock& block, T* scratch) {
    Arena<T> arena{scratch};
    Forward<T> task(p, block.channels, arena);
    for_each_segment(p, block, [&](int64_t n, const Sequence& seq, int64_t begin, int64_t end) {
      task.tokens(n, seq, begin, end);
    });
  };
  const auto run_state = [&](int64_t n, const Sequence& seq, ChannelRange channels, T* scratch) {
    Arena<T> arena{scratch};
    Forward<T>(p, channels, arena).final_state(n, seq);
  };
  Arena<T> size{nullptr};
  Forward<T>(p, {0, 0}, size);
  return for_each_token_block<T>(p, parallel, size.used, run) &&
         (p.final_state.rank < 0 || for_each_sequence<T>(p, parallel, size.used, run_state));
}

}  // namespace

bool short_conv(const ShortConvParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? forward<double>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
