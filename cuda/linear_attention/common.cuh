// What the kernels of linear attention share: their arguments, the segment a CTA walks, tile loads.
#pragma once

#include "linear_attention/traits.cuh"
#include "primitives/cp_async.cuh"
#include "primitives/element.cuh"

namespace based::cuda::linear {

// A (B, T, H, width) tensor; strides in elements.
struct Rows {
  void* data;
  int64_t batch, token, head;

  template <class Element>
  __device__ __forceinline__ Element* at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<Element*>(data) + b * batch + t * token + h * head;
  }
};

// (N, H, F, V) and (N, H, F) states in the public order; null data: not given.
struct State {
  float* kv = nullptr;
  float* k = nullptr;
  int64_t kv_sequence = 0, kv_head = 0, kv_row = 0, k_sequence = 0, k_head = 0;
};

struct Arguments {
  Rows q, k, v, out;
  Rows dout, dq, dk, dv;
  State initial, final;  // forward: the states; backward: initial, and the gradient of final
  State dinitial;
  const void* cu_seqlens;  // (N+1,) or null
  bool cu_is_int64;
  int64_t cu_stride;
  int64_t seqlen, sequences;   // T; B or N
  int64_t segment, segments;   // tokens of a segment; slots of the grid (segments of all sequences)
  int64_t borders;             // between two segments of a sequence: room for all of them
  int64_t per_sequence;        // slots of a sequence, without cu_seqlens
  int heads, head_dim, tiles;  // H, V, tiles of V
  float scale;
  bool normalize;
  float* workspace;    // (borders, H, tiles): a state each, in the registers' order
  float* inverse_den;  // (tiles, B, T, H): backward, 1 / den_t and delta_t of a tile
  float* delta;
  float* partial_dq;  // (tiles, B, T, H, D) where V takes several tiles, else null
  float* partial_dk;
  float* partial_r;  // (N, H, tiles, kF): a tile's gradient of the initial k_state
};

// A run of tokens of one sequence, walked by one CTA per head and tile of V.
struct Segment {
  int64_t sequence, batch, begin, end;  // tokens [begin, end) of batch row `batch`
  int64_t before;                       // tokens of the sequence before this segment
  int64_t border;                       // the border at its end; that at its start comes before
  bool first, last, exists;
};

__device__ __forceinline__ int64_t bound(const Arguments& a, int64_t i) {
  const int64_t value = a.cu_is_int64 ? static_cast<const int64_t*>(a.cu_seqlens)[i * a.cu_stride]
                                      : static_cast<const int32_t*>(a.cu_seqlens)[i * a.cu_stride];
  return min(max(value, int64_t(0)), a.seqlen);
}

// First slot of a sequence. Packed: floor(begin / segment) + i leaves every sequence room for its
// segments, one at least, so a CTA finds its own by bisection and nothing has to be counted.
__device__ __forceinline__ int64_t first_slot(const Arguments& a, int64_t i) {
  return a.cu_seqlens == nullptr ? i * a.per_sequence : bound(a, i) / a.segment + i;
}

// First border of a sequence that has any. Packed, it has at most end / segment - begin / segment.
__device__ __forceinline__ int64_t first_border(const Arguments& a, int64_t i) {
  return a.cu_seqlens == nullptr ? i * (a.per_sequence - 1) : bound(a, i) / a.segment;
}

__device__ __forceinline__ Segment sequence_of(const Arguments& a, int64_t i) {
  Segment s{i, i, 0, a.seqlen, 0, 0, true, true, true};
  if (a.cu_seqlens != nullptr) {
    s.batch = 0, s.begin = bound(a, i), s.end = max(s.begin, bound(a, i + 1));
  }
  return s;
}

// The last i < count for which below(i) holds, as it does for all before that; 0 if for none.
template <class Below>
__device__ __forceinline__ int64_t last_below(int64_t count, const Below& below) {
  int64_t i = 0;
  while (count - i > 1) {
    const int64_t middle = (i + count) / 2;
    (below(middle) ? i : count) = middle;
  }
  return i;
}

__device__ __forceinline__ Segment segment_at(const Arguments& a, int64_t sequence, int64_t index) {
  Segment s = sequence_of(a, sequence);
  const int64_t length = s.end - s.begin;
  s.before = index * a.segment;
  s.border = first_border(a, sequence) + index;
  s.exists = index >= 0 && (index == 0 || s.before < length);
  s.first = index == 0, s.last = s.before + a.segment >= length;
  s.begin += s.before;
  s.end = min(s.end, s.begin + a.segment);
  return s;
}

__device__ __forceinline__ Segment segment_of(const Arguments& a, int64_t slot) {
  const int64_t i =
      a.cu_seqlens == nullptr
          ? slot / a.per_sequence
          : last_below(a.sequences, [&](int64_t n) { return first_slot(a, n) <= slot; });
  return segment_at(a, i, slot - first_slot(a, i));
}

__device__ __forceinline__ int64_t sequence_at(const Arguments& a, int64_t border) {
  return a.cu_seqlens == nullptr
             ? border / (a.per_sequence - 1)
             : last_below(a.sequences, [&](int64_t n) { return first_border(a, n) <= border; });
}

// The segment before a border, or the one after it, if both are there.
__device__ __forceinline__ Segment segment_beside(const Arguments& a, int64_t border, bool after) {
  const int64_t i = sequence_at(a, border), index = border - first_border(a, i) + after;
  Segment s = segment_at(a, i, index);
  s.exists = after ? index > 0 && s.exists : s.exists && !s.last;
  return s;
}

// The CTA's (slot or border, head, tile of V) and where the state of a border lies in the
// workspace.
struct Place {
  int64_t slot;
  int head, tile;
  __device__ explicit Place(const Arguments& a) {
    const int64_t index = blockIdx.x, row = index / a.tiles;
    tile = int(index % a.tiles), head = int(row % a.heads), slot = row / a.heads;
  }
  __device__ int64_t index(const Arguments& a, int64_t border) const {
    return (border * a.heads + head) * a.tiles + tile;
  }
};

// Tokens [t, t + n) of a head into rows 0 ... n-1 of a (kChunk, .) tile, zeros below; kBlocks times
// 8 columns, of which `valid` exist.
template <int kBlocks, class Element, class Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const Rows& rows, int64_t batch, int64_t t,
                                          int n, int head, int first_column, int valid) {
  constexpr int kStep = kThreads / kBlocks;  // rows a pass
  const int row = threadIdx.x / kBlocks, block = threadIdx.x % kBlocks;
  const Element* start = rows.at<Element>(batch, t, head) + first_column;
  const Element* from = start + row * rows.token + 8 * block;
  const uint32_t to = tile.address(row, block);
#pragma unroll
  for (int pass = 0; pass < (kChunk + kStep - 1) / kStep; ++pass, from += kStep * rows.token) {
    if (kChunk % kStep != 0 && (row >= kStep || row + pass * kStep >= kChunk)) break;
    const bool exists = row + pass * kStep < n && block < valid;
    cp_async_16(to + pass * kStep * 16, exists ? from : start, exists);
  }
}

// Rows of a warp's 16-row strip of a tile to memory, 16 bytes a lane.
template <int kBlocks, class Element, class Tile>
__device__ __forceinline__ void store_strip(const Rows& rows, int64_t batch, int64_t t, int n,
                                            int head, int first_column, int valid, const Tile& tile,
                                            int first_row) {
  Element* base = rows.at<Element>(batch, t, head) + first_column;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int p = 0; p < 16 * kBlocks; p += 32) {
    const int row = first_row + (p + lane) / kBlocks, block = (p + lane) % kBlocks;
    if (p + lane < 16 * kBlocks && row < n && block < valid) {
      *reinterpret_cast<uint4*>(base + row * rows.token + 8 * block) =
          *reinterpret_cast<const uint4*>(tile.at(row, block));
    }
  }
}

template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  }
}

template <class Element>
__device__ __forceinline__ uint32_t multiply(uint32_t x, uint32_t y) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 product =
        __hmul2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
    return reinterpret_cast<const uint32_t&>(product);
  } else {
    const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(x),
                                           reinterpret_cast<const __nv_bfloat162&>(y));
    return reinterpret_cast<const uint32_t&>(product);
  }
}

// x y + z.
template <class Element>
__device__ __forceinline__ uint32_t multiply_add(uint32_t x, uint32_t y, uint32_t z) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair sum = __hfma2(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y),
                           reinterpret_cast<const Pair&>(z));
  return reinterpret_cast<const uint32_t&>(sum);
}

// 16-bit 1.0 in the low half.
template <class Element>
__host__ __device__ constexpr uint32_t one() {
  return std::is_same_v<Element, __half> ? 0x3c00u : 0x3f80u;
}

// fp16 operands reach 65504 only, and sums over tokens pass that. Their 16-bit copies are kept
// times a power of two that falls as tokens are counted; bf16 has fp32's range and needs none.
template <class Tr>
__device__ __forceinline__ float operand_unit(float tokens) {
  if constexpr (!Tr::kHalf) return 1.0f;
  const int exponent = (__float_as_int(fmaxf(tokens, 1.0f)) >> 23) - 127;  // floor(log2)
  return __int_as_float((127 - max(0, exponent - 8)) << 23);
}

// Gradients u_t = dout_t / den_t fall as tokens are counted; their fp16 copies are kept times this.
template <class Tr>
__device__ __forceinline__ float gradient_unit(const Arguments& a, float tokens) {
  if constexpr (!Tr::kHalf) return 1.0f;
  if (!a.normalize) return 1.0f;
  return __int_as_float(__float_as_int(fmaxf(tokens, 1.0f)) & 0x7f800000);  // 2^floor(log2)
}

// Tokens that the state holds at the end of the chunk that starts at token `done` of the segment.
__device__ __forceinline__ float tokens_seen(const Arguments& a, const Segment& seg, int head,
                                             int64_t done) {
  float initial = 0;
  if (a.initial.kv != nullptr) {
    initial = fabsf(a.initial.k[seg.sequence * a.initial.k_sequence + head * a.initial.k_head]);
  }
  return initial + float(seg.before + done + kChunk);
}

}  // namespace based::cuda::linear
