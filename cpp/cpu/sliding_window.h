// What the kernels of sliding-window attention share: where keys live, which pairs of a tile are
// visible, and products over the visible pairs.
//
// Keys are numbered from the first token of their sequence: key s >= 0 is token s of the call, key
// s < 0 lives in the initial ring. A tile pairs kChunk columns with rows that stream through in
// blocks of kRowBlock: queries with their keys, or keys with their queries. Either way a score tile
// is (kRowBlock, kChunk), and row r sees the columns [r + first, r + first + window).
#pragma once

#include "gemm.h"
#include "simd.h"
#include "tasks.h"
#include "tiles.h"

namespace based::cpu::BASED_ISA {

constexpr int kRowBlock = 192;
constexpr int kRowGroup = 12;  // granularity at which score tiles follow the band
constexpr int kTileGroup = 8;  // tiles of a head in a row: those share keys; all heads share pages

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Sequence n of a call: `length` tokens that follow the last `past` ones, which the ring holds.
struct WindowSequence {
  int64_t n, length, past;
  int64_t window;  // how many keys a query may see; no more than there are
  Sequence tokens;

  WindowSequence(const SlidingWindowParams& p, int64_t index)
      : n(index), tokens(sequence(p.cu_seqlens, index, p.q.size[1])), ring_size(p.window) {
    const TensorView& positions = p.initial_positions;
    const int64_t position = positions.rank < 0 ? 0 : load_index(positions, n);
    length = tokens.end - tokens.begin;
    past = min_of(position, ring_size);
    window = min_of(ring_size, past + length);
    ring_start = position % ring_size;
  }

  // Slot of key s >= -W.
  int64_t slot(int64_t s) const { return (ring_start + s % ring_size + ring_size) % ring_size; }

  // rows (count, ld) <- keys or values s0 .. s0 + count, s0 >= -past.
  template <class T>
  void load_keys(T* rows, int64_t ld, const TensorView& view, const TensorView& ring, int64_t s0,
                 int64_t count, int64_t h) const {
    const int64_t in_ring = s0 < 0 ? min_of(-s0, count) : 0;
    for (int64_t i = 0; i < in_ring; ++i) {
      load_rows(rows + i * ld, ld, ring, n, slot(s0 + i), 1, h, T(1));
    }
    load_rows(rows + in_ring * ld, ld, view, tokens.batch, tokens.begin + s0 + in_ring,
              count - in_ring, h, T(1));
  }

 private:
  int64_t ring_size, ring_start;
};

// The kChunk-token tiles of all sequences. Packed sequence n owns tile numbers from
// cu_seqlens[n] / kChunk + n, enough for its tokens; the last one may stay empty.
struct TileGrid {
  const TensorView& cu_seqlens;
  int64_t seqlen, sequences, count, tiles_of_each;

  explicit TileGrid(const SlidingWindowParams& p)
      : cu_seqlens(p.cu_seqlens),
        seqlen(p.q.size[1]),
        sequences(sequence_count(p.cu_seqlens, p.q.size[0])),
        tiles_of_each((seqlen + kChunk - 1) / kChunk) {
    count = cu_seqlens.rank < 0 ? sequences * tiles_of_each : seqlen / kChunk + sequences;
  }

  int64_t sequence_of(int64_t tile) const {
    if (cu_seqlens.rank < 0) return tile / tiles_of_each;
    int64_t low = 0, high = sequences;  // first_tile(low) <= tile < first_tile(high)
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_tile(middle) <= tile ? low : high) = middle;
    }
    return low;
  }

  int64_t first_tile(int64_t n) const {
    return cu_seqlens.rank < 0 ? n * tiles_of_each : load_index(cu_seqlens, n) / kChunk + n;
  }
};

// body(sequence, t0, n, h, scratch) for every tile of n > 0 tokens from t0 and every head h, in the
// order (group of tiles, head, tile).
template <class T, class BodyFn>
bool for_each_tile(const SlidingWindowParams& p, ParallelFor parallel, int64_t scratch_size,
                   const BodyFn& body) {
  const TileGrid grid(p);
  const int64_t H = p.q.size[2];
  return for_each_task<T>(parallel, grid.count * H, scratch_size, [&](int64_t task, T* scratch) {
    const int64_t group = task / (kTileGroup * H) * kTileGroup, i = task - group * H;
    const int64_t tiles = min_of(kTileGroup, grid.count - group), tile = group + i % tiles;
    const int64_t n = grid.sequence_of(tile), t0 = (tile - grid.first_tile(n)) * kChunk;
    const WindowSequence seq(p, n);
    if (t0 < seq.length) body(seq, t0, min_of(kChunk, seq.length - t0), i / tiles, scratch);
  });
}

struct Band {
  int64_t first, window;
};

// body(r, n, c0, c1) for groups of rows [r, r + n) and the columns [c0, c1), whole vectors, that
// any of them sees.
template <class T, class BodyFn>
void for_each_group(Band band, int64_t rows, int64_t columns, const BodyFn& body) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += kRowGroup) {
    const int64_t n = min_of(kRowGroup, rows - r);
    const int64_t c0 = max_of(0, r + band.first) / L * L;
    const int64_t c1 = round_up_lanes<T>(min_of(columns, r + n - 1 + band.first + band.window));
    if (c0 < c1) body(r, n, c0, c1);
  }
}

// out (columns, width) += weights^T x over the visible rows of x (rows, width) only. Column c sees
// the rows [c - first - window + 1, c - first + 1) clipped to the block, a parallelogram that is
// cut where an end changes between straight and slanted. The block is summed up in `part` (columns,
// width) first: one running sum over 100,000 rows would lose two digits.
template <class T>
void add_visible(Band band, int64_t rows, int64_t columns, int64_t width, const T* weights,
                 const T* x, T* part, T* out) {
  const int64_t begin = 1 - band.first - band.window, end = 1 - band.first;
  const int64_t last = min_of(columns, rows - begin);
  for (int64_t c = max_of(0, 1 - end), stop; c < last; c = stop) {
    const bool begin_moves = c + begin >= 0, end_moves = c + end < rows;
    stop = last;
    if (!begin_moves) stop = min_of(stop, -begin);
    if (end_moves) stop = min_of(stop, rows - end);
    const Columns visible = {begin_moves ? c + begin : 0, end_moves ? c + end : rows, begin_moves,
                             end_moves};
    gemm(stop - c, width, visible, weights + c, 1, kChunk, x, width, part, width, false);
    for (int64_t i = 0; i < (stop - c) * width; ++i) out[c * width + i] += part[i];
  }
}

// Sum of a[i] b[i], i < n; n is a multiple of kLanes<T>.
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  Vector<T> sums = {};
  for (int64_t i = 0; i < n; i += kLanes<T>) sums += load_vector(a + i) * load_vector(b + i);
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += sums[i];
  return sum;
}

}  // namespace based::cpu::BASED_ISA
