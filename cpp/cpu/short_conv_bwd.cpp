// Short gated convolution, backward. With c_t the convolution, a = act(c) and g_t = dL/dc_t:
//   dgate_t = dout_t a_t,  g_t = dout_t gate_t act'(c_t),  dx_s = sum_j weight_j g_{s+K-1-j},
//   dweight_j = sum_t g_t x_{t-K+1+j},  dbias = sum_t g_t
// One task is kTokens tokens times kChannels channels; it recomputes g of the K-1 tokens behind.
// Sums over tokens are taken per task, then over tasks in a fixed order and in double, so that they
// do not depend on the number of threads.
#include "short_conv.h"

namespace based::cpu::BASED_ISA {
namespace {

template <class T>
void gradient_row(Activation activation, const T* __restrict convolved, const T* __restrict gate,
                  const T* __restrict dout, T* __restrict dgate, T* __restrict g, int64_t n) {
  if (activation == Activation::kSilu) {
    for (int64_t i = 0; i < n; ++i) {
      const T c = convolved[i], sigmoid = 1 / (1 + exp_fast(-c));
      dgate[i] = dout[i] * (c * sigmoid);
      g[i] = dout[i] * gate[i] * (sigmoid * (1 + c * (1 - sigmoid)));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      dgate[i] = dout[i] * convolved[i];
      g[i] = dout[i] * gate[i];
    }
  }
}

// sums (K+1, kChannels) += g_t times each of the K inputs, and g_t itself.
template <class T>
void add_weight_gradient(T* __restrict sums, const T* __restrict g, const Convolution<T>& conv) {
  const int64_t n = conv.channels.count;
  for (int j = 0; j < conv.taps; ++j, sums += kChannels) {
    const T* __restrict row = conv.rows[j];
    for (int64_t i = 0; i < n; ++i) sums[i] += g[i] * row[i];
  }
  for (int64_t i = 0; i < n; ++i) sums[i] += g[i];
}

template <class T>
class Backward {
 public:
  static constexpr int64_t kScratch = Convolution<T>::kScratch + (3 * kMaxTaps + 6) * kChannels;
  Convolution<T> conv;

  Backward(const ShortConvBackwardParams& params, ChannelRange range, T* scratch)
      : conv(params, range, scratch),
        p(params),
        history(conv.taps - 1),
        g(scratch + Convolution<T>::kScratch),
        dfinal(g + kMaxTaps * kChannels),
        dinitial(dfinal + kMaxTaps * kChannels),
        convolved(dinitial + kMaxTaps * kChannels),
        gate(convolved + kChannels),
        dout(gate + kChannels),
        dgate(dout + kChannels),
        dx(dgate + kChannels),
        zeros(dx + kChannels) {
    fill(zeros, T(0), kChannels);
  }

  // dx and dgate of tokens [begin, end) of sequence n; their part of the weight gradient is added
  // to sums (K+1, kChannels).
  void tokens(int64_t n, const Sequence& seq, int64_t begin, int64_t end, T* sums) {
    start(n, seq, begin, end);
    for (int64_t t = begin; t < end + history; ++t) {
      gradient(t, t < end);
      if (t < end) add_weight_gradient(sums, slot(t), conv);
      const int64_t s = t - history;
      if (s < begin) continue;
      T* row = target_row(p.dx, conv.offset(p.dx, s), dx);
      input_gradient(s, row);
      write_row(p.dx, conv.offset(p.dx, s), conv.channels.count, row);
    }
  }

  // The gradient of the K-1 inputs before sequence n.
  void initial_state(int64_t n, const Sequence& seq) {
    start(n, seq, seq.begin, seq.begin);
    const T* rows[kMaxTaps];
    for (int i = 0; i < history; ++i) {
      gradient(seq.begin + i, false);
      input_gradient(seq.begin - history + i, dinitial + i * kChannels);
      rows[i] = dinitial + i * kChannels;
    }
    conv.store_state(p.dinitial_state, n, rows);
  }

 private:
  void start(int64_t n, const Sequence& sequence, int64_t begin, int64_t end) {
    seq = sequence;
    conv.start(n, seq, begin);
    fill(g, T(0), conv.taps * kChannels);
    if (end > seq.end - history) conv.load_state(dfinal, p.dfinal_state, n);
  }

  // g of the last K tokens.
  T* slot(int64_t t) const { return g + t % conv.taps * kChannels; }

  // g_t, 0 past the sequence; and dgate_t where it is wanted.
  void gradient(int64_t t, bool wants_dgate) {
    if (t >= seq.end) return fill(slot(t), T(0), kChannels);
    const int64_t n = conv.channels.count;
    conv.advance(t);
    conv.evaluate(convolved);
    wants_dgate = wants_dgate && p.dgate.rank >= 0;
    T* dgate_row = wants_dgate ? target_row(p.dgate, conv.offset(p.dgate, t), dgate) : dgate;
    gradient_row(p.activation, convolved, conv.gate(t, gate),
                 read_row(p.dout, conv.offset(p.dout, t), n, dout), dgate_row, slot(t), n);
    if (wants_dgate) write_row(p.dgate, conv.offset(p.dgate, t), n, dgate_row);
  }

  // The gradient of input s, once g of s .. s+K-1 is there (0 for tokens before the sequence).
  void input_gradient(int64_t s, T* row) const {
    const T* readers[kMaxTaps];
    for (int j = 0; j < conv.taps; ++j) readers[j] = slot(s + history - j + conv.taps);
    const int64_t kept = s - (seq.end - history);  // its row of the final state
    convolve(conv.taps, row, readers, conv.weight, kept < 0 ? zeros : dfinal + kept * kChannels,
             conv.channels.count);
  }

  const ShortConvBackwardParams& p;
  const int history;
  T *const g, *const dfinal, *const dinitial;  // (K, kChannels), (K-1, kChannels) twice
  T *const convolved, *const gate, *const dout, *const dgate, *const dx, *const zeros;
  Sequence seq{};
};

// dweight and dbias of a range of channels from `count` partial sums (K+1, kChannels), which lie
// `stride` apart.
template <class T>
void reduce_weight_gradient(const ShortConvBackwardParams& p, ChannelRange channels,
                            const T* partials, int64_t count, int64_t stride, T* scratch) {
  const int taps = static_cast<int>(p.weight.size[1]);
  const T* rows[kMaxTaps + 1];
  for (int j = 0; j <= taps; ++j) {
    double sum[kChannels] = {};
    for (int64_t block = 0; block < count; ++block) {
      const T* partial = partials + block * stride + j * kChannels;
      for (int64_t i = 0; i < channels.count; ++i) sum[i] += partial[i];
    }
    T* row = scratch + j * kChannels;
    for (int64_t i = 0; i < channels.count; ++i) row[i] = static_cast<T>(sum[i]);
    rows[j] = row;
  }
  store_columns(p.dweight, channels.begin * p.dweight.stride[0], p.dweight.stride[0],
                channels.count, taps, rows, scratch + (kMaxTaps + 1) * kChannels);
  if (p.dbias.rank >= 0) {
    store(p.dbias.data, p.dbias.dtype, channels.begin, rows[taps], channels.count);
  }
}

template <class T>
bool backward(const ShortConvBackwardParams& p, ParallelFor parallel, T* partials) {
  const int64_t C = p.x.size[2], blocks = channel_blocks(C);
  const int64_t partial_size = (p.weight.size[1] + 1) * kChannels;
  bool done = for_each_token_block<T>(
      p, parallel, Backward<T>::kScratch, [&](const TokenBlock& block, T* scratch) {
        T* sums = partials + block.task * partial_size;
        fill(sums, T(0), partial_size);
        Backward<T> task(p, block.channels, scratch);
        for_each_segment(p, block, [&](int64_t n, const Sequence& seq, int64_t begin, int64_t end) {
          task.tokens(n, seq, begin, end, sums);
        });
      });
  if (done && p.dinitial_state.rank >= 0) {
    const int64_t sequences = sequence_count(p.cu_seqlens, p.x.size[0]);
    done = for_each_task<T>(parallel, sequences * blocks, Backward<T>::kScratch,
                            [&](int64_t task, T* scratch) {
                              const int64_t n = task / blocks;
                              Backward<T>(p, channel_range(task % blocks, C), scratch)
                                  .initial_state(n, sequence(p.cu_seqlens, n, p.x.size[1]));
                            });
  }
  return done &&
         for_each_task<T>(
             parallel, blocks, (2 * kMaxTaps + 1) * kChannels, [&](int64_t block, T* scratch) {
               reduce_weight_gradient(p, channel_range(block, C), partials + block * partial_size,
                                      token_blocks(p), blocks * partial_size, scratch);
             });
}

template <class T>
bool with_partials(const ShortConvBackwardParams& p, ParallelFor parallel) {
  const int64_t tasks = token_blocks(p) * channel_blocks(p.x.size[2]);
  const int64_t elements = tasks * (p.weight.size[1] + 1) * kChannels;
  T* partials = static_cast<T*>(aligned_alloc(64, elements * sizeof(T) + 64));
  const bool done = partials != nullptr && backward<T>(p, parallel, partials);
  free(partials);
  return done;
}

}  // namespace

bool short_conv_backward(const ShortConvBackwardParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? with_partials<double>(p, parallel)
                                      : with_partials<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
