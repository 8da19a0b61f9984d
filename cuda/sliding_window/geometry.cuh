// Where the tokens, keys and tiles of a call are. Keys and queries are numbered from the first
// token of their sequence: s >= 0 is token s of the call, s < 0 is a key of the initial ring. A CTA
// owns a tile of neighbouring rows (queries, or keys in the backward) of one sequence and head, cut
// into strips of 16 that its warps take in turn, and meets the columns (the other of the two) that
// its rows see.
#pragma once

#include <cstdint>

#include "based/params.h"
#include "primitives/packed.cuh"

namespace based::cuda {

// What the launcher knows. All counts of tokens of one sequence fit 30 bits.
struct WindowLayout {
  IndexVector cu_seqlens, positions;
  int64_t sequences;     // N
  int heads, head_dim;   // H, V
  int seqlen;            // T
  int window;            // W, no more than the keys that can exist
  int ring_size;         // W of the initial ring, 0 without one
  int rows;              // of a tile
  int tiles_of_each;     // tiles of a sequence when nothing is packed
  int stages;            // blocks of columns in shared memory
  unsigned per_stage;    // 2^32 / stages, rounded up
  bool packed, aligned;  // aligned: every row of every tensor starts at a multiple of 16 bytes
};

struct WindowSequence {
  int64_t n, batch, begin;  // token t is (batch, begin + t)
  int length;               // tokens of this call
  int past;                 // keys of the initial ring
  int ring_start;           // slot of key 0
  bool bad;                 // bounds or position make no sense: the outputs are NaN
};

__device__ __forceinline__ int64_t clamp_token(int64_t t, int64_t T) {
  return t < 0 ? 0 : t > T ? T : t;
}

// Sequence n of a packed call starts at this tile: enough tiles for everything before it. Number N
// stands for tokens behind the last sequence, of which there should be none.
__device__ __forceinline__ int64_t first_tile(const WindowLayout& l, int64_t n) {
  return n == 0 ? 0 : clamp_token(l.cu_seqlens[n], l.seqlen) / l.rows + n;
}

__device__ __forceinline__ WindowSequence window_sequence(const WindowLayout& l, int64_t n) {
  WindowSequence seq = {n, n, 0, l.seqlen, 0, 0, false};
  if (l.packed) {
    const int64_t T = l.seqlen, begin = l.cu_seqlens[n];
    const int64_t end = n < l.sequences ? l.cu_seqlens[n + 1] : T;
    seq.bad = n == l.sequences || begin < 0 || end < begin || end > T || (n == 0 && begin != 0);
    seq.batch = 0;
    seq.begin = n == 0 ? 0 : clamp_token(begin, T);
    seq.length = static_cast<int>(max(int64_t(0), clamp_token(end, T) - seq.begin));
  }
  if (l.ring_size > 0 && n < l.sequences) {
    const int64_t position = l.positions[n];
    seq.bad |= position < 0;
    if (position > 0) {
      seq.past = static_cast<int>(min(position, int64_t(l.ring_size)));
      seq.ring_start = static_cast<int>(position % l.ring_size);
    }
  }
  return seq;
}

// The sequence of a tile of tokens, and the first of its rows in that sequence.
struct TokenTile {
  int64_t n;
  int first;
};

__device__ __forceinline__ TokenTile token_tile(const WindowLayout& l, unsigned tile) {
  if (!l.packed) {
    const unsigned each = l.tiles_of_each, n = tile / each;
    return {n, static_cast<int>(tile - n * each) * l.rows};
  }
  // first_tile(low) <= tile < first_tile(high); every lane of a warp looks at one candidate
  int64_t low = 0, high = l.sequences + 1;
  while (high - low > 1) {
    const int64_t step = (high - low + 31) / 32, candidate = low + threadIdx.x % 32 * step;
    const bool reached = candidate < high && first_tile(l, candidate) <= tile;
    const int last = 31 - __clz(__ballot_sync(0xffffffff, reached) | 1);
    low += last * step;
    high = min(high, low + step);
  }
  return {low, static_cast<int>(tile - first_tile(l, low)) * l.rows};
}

// Row r sees the columns [first(r), last(r)].
struct Band {
  int below, above, lower, upper;

  __device__ __forceinline__ int first(int r) const { return max(r - below, lower); }
  __device__ __forceinline__ int last(int r) const { return min(r + above, upper); }
};

// The blocks of columns, counted from column0, that a strip of rows walks through.
struct Walk {
  int first, steps;

  __device__ __forceinline__ Walk(const Band& band, int row0, int column0, int step)
      : first((band.first(row0) - column0) >> 4),
        steps(max(0, ((band.last(row0 + 15) - column0) >> 4) - first + step) / step) {}
};

// The columns that every row of a strip sees, and those that a lane's two rows see, g and g + 8.
struct RowBand {
  int all_first, all_last;
  int low[2], high[2];

  __device__ __forceinline__ RowBand(const Band& band, int row0, int g)
      : all_first(band.first(row0 + 15)),
        all_last(band.last(row0)),
        low{band.first(row0 + g), band.first(row0 + g + 8)},
        high{band.last(row0 + g), band.last(row0 + g + 8)} {}

  // Whether some row does not see all of the 16 columns from c on.
  __device__ __forceinline__ bool cuts(int c) const { return c < all_first || c + 15 > all_last; }

  // Elements of a (16, 16) block that are not seen <- hidden; `column` is the lane's first column.
  __device__ __forceinline__ void mask(float (&block)[2][4], int column, float hidden) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = column + 8 * j + i % 2;
        if (c < low[i / 2] || c > high[i / 2]) block[j][i] = hidden;
      }
    }
  }
};

// One (T, V) slice of a (B, T, H, V) tensor (or (T,) of a (B, T, H) one), and the (W, V) slice of
// the ring before it. Kernels keep it in shared memory: it is the same for every thread, and only
// loads and stores need it.
template <class Element>
struct RowSource {
  Element* tokens;
  int64_t token_stride;
  Element* ring;
  int64_t slot_stride;
  int ring_start, ring_size;

  __device__ __forceinline__ Element* row(int s) const {
    if (s >= 0) return tokens + s * token_stride;
    const int slot = ring_start + s;
    return ring + (slot < 0 ? slot + ring_size : slot) * slot_stride;
  }
};

template <class Element>
__device__ __forceinline__ RowSource<Element> row_source(const TensorView& view,
                                                         const WindowSequence& seq, int h) {
  return {static_cast<Element*>(view.data) + seq.batch * view.stride[0] +
              seq.begin * view.stride[1] + h * view.stride[2],
          view.stride[1],
          nullptr,
          0,
          0,
          0};
}

template <class Element>
__device__ __forceinline__ RowSource<Element> row_source(const TensorView& view,
                                                         const TensorView& ring,
                                                         const WindowSequence& seq, int h, int W) {
  RowSource<Element> source = row_source<Element>(view, seq, h);
  if (ring.rank < 0) return source;
  source.ring = static_cast<Element*>(ring.data) + seq.n * ring.stride[0] + h * ring.stride[2];
  source.slot_stride = ring.stride[1];
  source.ring_start = seq.ring_start, source.ring_size = W;
  return source;
}

}  // namespace based::cuda
