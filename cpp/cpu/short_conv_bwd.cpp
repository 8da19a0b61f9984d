// Short gated convolution, backward. With c_t the convolution, a = act(c) and g_t = dL/dc_t:
//   dgate_t = dout_t a_t,  g_t = dout_t gate_t act'(c_t),  dx_s = sum_j weight_j g_{s+K-1-j},
//   dweight_j = sum_t g_t x_{t-K+1+j},  dbias = sum_t g_t
// One task is kTokens tokens times kChannels channels; it recomputes g of the K-1 tokens behind.
// Sums over tokens are taken per task, then over tasks in a fixed order and in double, so that they
// do not depend on the number of threads.
#include "short_conv.h"

namespace based::cpu::BASED_ISA {
namespace {

// sums (K+1, ld) += g times each of the K rows, and g itself, channels [c, c + n).
template <class T>
void add_weight_gradient(T* __restrict sums, const T* __restrict g, const Convolution<T>& conv,
                         int64_t c, int64_t n) {
  for (int j = 0; j < conv.taps; ++j) {
    T* __restrict sum = sums + j * conv.ld + c;
    const T* __restrict row = conv.rows[j] + c;
    for (int64_t i = 0; i < n; ++i) sum[i] += g[i] * row[i];
  }
  T* __restrict sum = sums + conv.taps * conv.ld + c;
  for (int64_t i = 0; i < n; ++i) sum[i] += g[i];
}

template <class T>
class Backward {
 public:
  Convolution<T> conv;

  Backward(const ShortConvBackwardParams& params, ChannelRange channels, Arena<T>& arena)
      : conv(params, channels, arena), p(params), history(conv.taps - 1) {
    g = arena.take(conv.taps * conv.ld), dfinal = arena.take(history * conv.ld);
    dinitial = arena.take(history * conv.ld);
    gate = arena.take(kStrip), dout = arena.take(kStrip);
    dgate = arena.take(kStrip), dx = arena.take(kStrip), zeros = arena.take(kStrip);
    if (arena.base != nullptr) fill(zeros, T(0), kStrip);
  }

  // dx and dgate of tokens [begin, end) of sequence n; their part of the weight gradient is added
  // to sums (K+1, ld).
  void tokens(int64_t n, const Sequence& sequence, int64_t begin, int64_t end, T* sums) {
    start(n, sequence, begin, end);
    for (int64_t t = begin; t < end + history; ++t) {
      if (t < seq.end) conv.advance(t);
      for_each_strip(conv.channels.count, [&](int64_t c, int64_t m) {
        gradient(t, t < end, c, m);
        if (t < end) add_weight_gradient(sums, slot(t) + c, conv, c, m);
        const int64_t s = t - history;
        if (s < begin) return;
        const int64_t offset = conv.offset(p.dx, s) + c;
        T* row = target_row(p.dx, offset, dx);
        input_gradient(s, row, c, m);
        write_row(p.dx, offset, m, row);
      });
    }
  }

  // The gradient of the K-1 inputs before sequence n.
  void initial_state(int64_t n, const Sequence& sequence) {
    start(n, sequence, sequence.begin, sequence.begin);
    const T* rows[kMaxTaps];
    for (int i = 0; i < history; ++i) {
      const int64_t t = seq.begin + i;
      T* row = dinitial + i * conv.ld;
      if (t < seq.end) conv.advance(t);
      for_each_strip(conv.channels.count, [&](int64_t c, int64_t m) {
        gradient(t, false, c, m);
        input_gradient(t - history, row + c, c, m);
      });
      rows[i] = row;
    }
    conv.store_state(rows, p.dinitial_state, n);
  }

 private:
  void start(int64_t n, const Sequence& sequence, int64_t begin, int64_t end) {
    seq = sequence;
    conv.start(n, seq, begin);
    fill(g, T(0), conv.taps * conv.ld);
    if (end > seq.end - history) conv.load_state(dfinal, p.dfinal_state, n);
  }

  // g_t, kept for K tokens.
  T* slot(int64_t t) const { return g + t % conv.taps * conv.ld; }

  // g_t of channels [c, c + n), 0 past the sequence; dgate_t where it is wanted.
  void gradient(int64_t t, bool wants_dgate, int64_t c, int64_t n) {
    if (t >= seq.end) return fill(slot(t) + c, T(0), n);
    wants_dgate = wants_dgate && p.dgate.rank >= 0;
    const int64_t offset = wants_dgate ? conv.offset(p.dgate, t) + c : 0;
    T* dgate_row = wants_dgate ? target_row(p.dgate, offset, dgate) : dgate;
    T* g_row = slot(t) + c;
    const T* gate_row = conv.gate(c, n, gate);
    const T* dout_row = read_row(p.dout, conv.offset(p.dout, t) + c, n, dout);
    if (p.activation == Activation::kSilu) {
      conv.evaluate(c, n, [=](int64_t i, T sum) {
        const T s = sigmoid(sum);
        dgate_row[i] = dout_row[i] * (sum * s);
        g_row[i] = dout_row[i] * gate_row[i] * (s * (1 + sum * (1 - s)));
      });
    } else {
      conv.evaluate(c, n, [=](int64_t i, T sum) {
        dgate_row[i] = dout_row[i] * sum;
        g_row[i] = dout_row[i] * gate_row[i];
      });
    }
    if (wants_dgate) write_row(p.dgate, offset, n, dgate_row);
  }

  // The gradient of input s, once g of s .. s+K-1 is there (0 for tokens before the sequence).
  void input_gradient(int64_t s, T* row, int64_t c, int64_t n) const {
    const T* readers[kMaxTaps];
    for (int j = 0; j < conv.taps; ++j) readers[j] = slot(s + history - j + conv.taps);
    const int64_t kept = s - (seq.end - history);  // its row of the final state
    const T* base = kept < 0 ? zeros : dfinal + kept * conv.ld + c;
    convolve(conv.taps, readers, conv.weight, conv.ld, base, c, n,
             [=](int64_t i, T sum) { row[i] = sum; });
  }

  const ShortConvBackwardParams& p;
  const int history;
  T *g, *dfinal, *dinitial;             // (K, ld), (K-1, ld) twice
  T *gate, *dout, *dgate, *dx, *zeros;  // strips
  Sequence seq{};
};

// dweight and dbias of a range of channels from `count` partial sums (K+1, ld), `stride` apart.
template <class T>
void reduce_weight_gradient(const ShortConvBackwardParams& p, ChannelRange channels,
                            const T* partials, int64_t count, int64_t stride, T* scratch) {
  const int64_t ld = scratch_stride(p.x.size[2]);
  const int taps = static_cast<int>(p.weight.size[1]);
  const T* rows[kMaxTaps + 1];
  for (int j = 0; j <= taps; ++j) {
    T* row = scratch + j * ld;
    for_each_strip(channels.count, [&](int64_t c, int64_t m) {
      double sum[kStrip] = {};
      for (int64_t block = 0; block < count; ++block) {
        const T* partial = partials + block * stride + j * ld + c;
        for (int64_t i = 0; i < m; ++i) sum[i] += partial[i];
      }
      for (int64_t i = 0; i < m; ++i) row[c + i] = static_cast<T>(sum[i]);
    });
    rows[j] = row;
  }
  store_columns(rows, p.dweight, channels.begin * p.dweight.stride[0], p.dweight.stride[0],
                channels.count, taps, scratch + (taps + 1) * ld);
  if (p.dbias.rank >= 0) {
    store_row(p.dbias, channels.begin, rows[taps], channels.count);
  }
}

template <class T>
bool backward(const ShortConvBackwardParams& p, ParallelFor parallel, T* partials) {
  const int64_t C = p.x.size[2], blocks = channel_blocks(C), ld = scratch_stride(C);
  const int64_t taps = p.weight.size[1], partial_size = (taps + 1) * ld;
  const auto run = [&](const TokenBlock& block, T* scratch) {
    T* sums = partials + block.task * partial_size;
    fill(sums, T(0), partial_size);
    Arena<T> arena{scratch};
    Backward<T> task(p, block.channels, arena);
    for_each_segment(p, block, [&](int64_t n, const Sequence& seq, int64_t begin, int64_t end) {
      task.tokens(n, seq, begin, end, sums);
    });
  };
  const auto run_state = [&](int64_t n, const Sequence& seq, ChannelRange channels, T* scratch) {
    Arena<T> arena{scratch};
    Backward<T>(p, channels, arena).initial_state(n, seq);
  };
  const auto reduce = [&](int64_t block, T* scratch) {
    reduce_weight_gradient(p, channel_range(block, C), partials + block * partial_size,
                           token_blocks(p), blocks * partial_size, scratch);
  };
  Arena<T> size{nullptr};
  Backward<T>(p, {0, 0}, size);
  return for_each_token_block<T>(p, parallel, size.used, run) &&
         (p.dinitial_state.rank < 0 || for_each_sequence<T>(p, parallel, size.used, run_state)) &&
         for_each_task<T>(parallel, blocks, (2 * taps + 1) * ld, reduce);
}

template <class T>
bool with_partials(const ShortConvBackwardParams& p, ParallelFor parallel) {
  const int64_t C = p.x.size[2], tasks = token_blocks(p) * channel_blocks(C);
  const int64_t elements = tasks * (p.weight.size[1] + 1) * scratch_stride(C);
  T* partials = static_cast<T*>(aligned_alloc(64, (elements * sizeof(T) + 64) / 64 * 64));
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
