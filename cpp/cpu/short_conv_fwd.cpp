// Short gated convolution, forward. One task is kTokens tokens of the batch times kChannels
// channels:
//   out_t = act(sum_j weight_j x_{t-K+1+j} + bias) * gate_t
// float32 and float64 rows are read and written where they are: x and gate once, out once.
#include "short_conv.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
bool forward(const ShortConvParams& p, ParallelFor parallel) {
  constexpr int64_t kScratch = Convolution<T>::kScratch + 3 * kChannels;
  const bool done =
      for_each_token_block<T>(p, parallel, kScratch, [&](const TokenBlock& block, T* scratch) {
        T* convolved = scratch + Convolution<T>::kScratch;
        T *gate_buffer = convolved + kChannels, *out_buffer = gate_buffer + kChannels;
        Convolution<T> conv(p, block.channels, scratch);
        for_each_segment(p, block, [&](int64_t n, const Sequence& seq, int64_t begin, int64_t end) {
          conv.start(n, seq, begin);
          for (int64_t t = begin; t < end; ++t) {
            conv.advance(t);
            conv.evaluate(convolved);
            const int64_t offset = conv.offset(p.out, t);
            T* out = target_row(p.out, offset, out_buffer);
            finish_row(p.activation, convolved, conv.gate(t, gate_buffer), out,
                       block.channels.count);
            write_row(p.out, offset, block.channels.count, out);
          }
        });
      });
  if (!done || p.final_state.rank < 0) return done;
  // After the last token, the window without its oldest input is the final state.
  const int64_t C = p.x.size[2], blocks = channel_blocks(C);
  return for_each_task<T>(parallel, sequence_count(p.cu_seqlens, p.x.size[0]) * blocks,
                          Convolution<T>::kScratch, [&](int64_t task, T* scratch) {
                            const int64_t n = task / blocks;
                            const Sequence seq = sequence(p.cu_seqlens, n, p.x.size[1]);
                            Convolution<T> conv(p, channel_range(task % blocks, C), scratch);
                            conv.start(n, seq, seq.end);
                            conv.store_state(p.final_state, n, conv.rows + 1);
                          });
}

}  // namespace

bool short_conv(const ShortConvParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? forward<double>(p, parallel) : forward<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
