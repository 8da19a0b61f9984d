// decode_block: four products that wait for each other, in one kernel.
//
// A stage is out (N, M) = x (N, K) weight (M, K)^T and what follows it. Each is what the next one
// reads, so all CTAs of the grid run at the same time, and count up in global memory what they have
// finished of a stage. What a stage has to wait for is short beside what it has to read, its
// weights; so each CTA has a ring of blocks of weights that is filled without regard to stages, and
// memory is busy while the stages change.
//
// A CTA takes a tile of 128 rows of the weights (where there are gates, eight of values and eight
// of their gates in turns) and a span of K. The CTAs that share K lie in one cluster; each sends
// its sums of eight rows of x to the CTA that adds them up, in the order of the spans. A norm is
// not computed before a product but with it: x times the norm's weight is what the stage before
// leaves, with sums of squares, and the product's rows are divided by the root mean square.
//
// A stage of more tiles than CTAs takes several passes: whole tiles as long as every CTA gets one,
// then what is left, again by spans of K. Not if it adds to the residual or convolves: what those
// keep in shared memory would be in the way of others' sums for the last pass.
//
// Where a convolution follows, what it keeps of a row arrives in shared memory during the product.
#pragma once

#include <cuda.h>

#include "based/params.h"
#include "decode_block/tuning.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cluster.cuh"
#include "primitives/decode_row.cuh"
#include "primitives/early_launch.cuh"
#include "primitives/element.cuh"
#include "primitives/mma.cuh"
#include "primitives/tensor_copy.cuh"
#include "primitives/vector.cuh"

namespace based::cuda {

using BlockElement = __nv_bfloat16;

// What becomes of a product: itself, or its columns are values and then their gates, of
// value * silu(gate) or of silu(convolution of values) * gate.
enum class BlockEnding { kLinear, kSwiglu, kConvolution };

struct BlockStage {
  CUtensorMap weight, x;  // boxes of 128 and of kRows rows
  int columns;            // of out
  int tiles, blocks;      // of the weights: along M, and along K
  int passes;             // of whole tiles
  int splits;             // CTAs that share K in the last pass
  unsigned before;        // what the counter says when all stages before are finished
  BlockEnding ending;
  const BlockElement* bias;  // of the product's columns, or null
  const float* squares;      // null, or of x: (tiles of the stage before, kDecodeBlockMaxRows)
  int square_tiles;
  BlockElement* out;  // rows out_stride apart
  int64_t out_stride;
  bool out_pairs;  // whether two neighbours start at a multiple of their size
  // If norm is given: residual_out = residual + the product, out = residual_out * norm.
  const BlockElement* norm;
  const float* residual;
  int64_t residual_stride;
  bool residual_pairs;
  float* residual_out;  // rows of `columns`
  float* squares_out;   // sums of squares of residual_out in a tile

  __host__ __device__ bool gated() const { return ending != BlockEnding::kLinear; }
};

struct BlockConvolution {
  const BlockElement* weight;  // (columns, taps), rows weight_stride apart
  BlockElement* state;         // (slots, columns, taps - 1), slots state_stride apart
  int64_t weight_stride, state_stride, slots;
  IndexVector indices;
  int taps;
};

constexpr int kBlockStages = 4;  // of a block

struct BlockArgs {
  BlockStage stages[kBlockStages * kDecodeMaxBlocks];
  BlockConvolution convolutions[kDecodeMaxBlocks];  // of the blocks' last stages
  int stage_count;
  int rows, width;  // of what is normed
  float eps;
  unsigned* counter;  // counts, for all CTAs, the tiles that they have finished
  unsigned last;      // so many, and the next one makes it 0
};

enum BlockThreads { kBlockComputing = 256, kBlockWeights = 256, kBlockX = 288, kBlockScales = 320 };
constexpr int kBlockThreads = 352;  // eight warps that compute, and three that serve them

// What a CTA does in a pass of a stage: blocks first ... first + count - 1 of K of a tile, and in
// the end its share of the sums' groups of eight rows.
struct BlockWork {
  int tile;
  int splits, part;  // CTAs that share K
  int first, count;
  int rows;  // of x

  __device__ __forceinline__ BlockWork(const BlockArgs& args, int s, int pass) : rows(args.rows) {
    const BlockStage& stage = args.stages[s];
    splits = pass < stage.passes ? 1 : stage.splits;
    const int teams = gridDim.x / splits;
    part = blockIdx.x % kBlockCluster % splits;
    first = share_begin(part, stage.blocks), count = share_begin(part + 1, stage.blocks) - first;
    // Where not all teams have a tile, they are others in every stage.
    tile = pass * gridDim.x + (blockIdx.x / splits + s * teams / kBlockStages) % teams;
  }
  // Where what a part has of n things begins. splits is a power of 2.
  __device__ __forceinline__ int share_begin(int part, int n) const {
    return part * n >> (31 - __clz(splits));
  }
  __device__ __forceinline__ int groups() const { return (rows + 7) / 8; }  // of eight rows
  // The first and the end of those that a part finishes.
  __device__ __forceinline__ int begin(int part) const { return share_begin(part, groups()); }
  __device__ __forceinline__ int begin() const { return begin(part); }
  // Groups in a part's batch.
  __device__ __forceinline__ int in_batch(int part, int batch) const {
    return max(0, min(kBlockBatch, begin(part + 1) - begin(part) - batch * kBlockBatch));
  }
  __device__ __forceinline__ int end() const { return begin(part + 1); }
  __device__ __forceinline__ bool in_first_pass() const { return tile < int(gridDim.x); }
  // The cluster's rank of part 0.
  __device__ __forceinline__ int leader() const { return blockIdx.x % kBlockCluster - part; }
};

// Rings of blocks: rows of 128 bytes in wgmma's 128-byte swizzle.
template <int kRows>
struct BlockShared {
  static constexpr int kHeld = block_held(kRows);
  static constexpr int kXSlots = block_x_slots(kRows), kXBytes = kRows * 128;
  static constexpr int kWeightBytes = kBlockTile * 128;
  // Of groups, in one of two shares.
  static constexpr int kBatches = ((kRows / 8 + 1) / 2 + kBlockBatch - 1) / kBlockBatch;
  // Of eight rows, a float4 of every computing thread; at most so many of so many CTAs.
  static constexpr int kGroupBytes = 16 * kBlockComputing;
  static constexpr int kSumsBytes =
      kGroupBytes * (kRows / 8 > kBlockCluster ? kRows / 8 : kBlockCluster);
  static constexpr int kSlots =
      (227 * 1024 - kBlockBarrierBytes - kXSlots * kXBytes - kSumsBytes) / kWeightBytes;

  alignas(1024) char weights[kSlots * kWeightBytes];
  alignas(1024) char x[kXSlots * kXBytes];
  alignas(16) char sums[kSumsBytes];
  Mbarrier weights_full[kSlots], weights_empty[kSlots];
  Mbarrier x_full[kXSlots], x_empty[kXSlots];
  Mbarrier sums_full[kBatches], states_full;
  Mbarrier ready;     // what the scales of a tile need
  Mbarrier finished;  // a tile
  // Of the rows that this CTA finishes:
  float scales[2][kRows];  // 1 / root mean square, of a block's stages 1 and 3
  int64_t slots[kRows];    // of the convolution's states; -1: skipped; kNone: there is no such slot
  static constexpr int64_t kNone = -2;

  // A computing thread's sums of a group of rows: this CTA's, where x was, and those it was given.
  __device__ __forceinline__ float4* own_sums(int group) {
    return reinterpret_cast<float4*>(x) + group * kBlockComputing + threadIdx.x;
  }
  __device__ __forceinline__ float4* others_sums(int place) {
    return reinterpret_cast<float4*>(sums) + place * kBlockComputing + threadIdx.x;
  }
  // What a convolution keeps of a tile's values in a row of this CTA's; all of it lies where this
  // CTA would send itself its sums.
  __device__ __forceinline__ BlockElement* state(const BlockWork& work, int row, int taps) {
    const int in_share = row - work.begin() * 8, bytes = state_bytes(taps) + 16;
    return reinterpret_cast<BlockElement*>(own_place(work) + in_share * bytes);
  }
  __device__ __forceinline__ char* own_place(const BlockWork& work) {
    return sums + work.part * (work.end() - work.begin()) * kGroupBytes;
  }
  static constexpr __host__ __device__ int state_bytes(int taps) {
    return kBlockTile / 2 * (taps - 1) * int(sizeof(BlockElement));
  }
  static_assert(8 * (state_bytes(kDecodeBlockMaxTaps) + 16) <= kGroupBytes);
  __device__ __forceinline__ void init() {
    for (Mbarrier& barrier : weights_full) barrier.init(1);
    for (Mbarrier& barrier : x_full) barrier.init(1);
    for (Mbarrier& barrier : weights_empty) barrier.init(8);  // warps that read
    for (Mbarrier& barrier : x_empty) barrier.init(8);
    for (Mbarrier& barrier : sums_full) barrier.init(1);
    states_full.init(32);
    ready.init(1);
    finished.init(kBlockComputing);
    fence_barrier_init();
  }
};

// A place in a ring, and the parity of its turn.
template <int kSlots>
struct RingPlace {
  int slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// fn(s, stage, work) for all that this CTA does, in order.
template <class Fn>
__device__ __forceinline__ void for_each_tile(const BlockArgs& args, const Fn& fn) {
#pragma unroll 1
  for (int s = 0; s < args.stage_count; ++s) {
#pragma unroll 1
    for (int pass = 0; pass <= args.stages[s].passes; ++pass) {
      const BlockWork work(args, s, pass);
      if (work.tile < args.stages[s].tiles) fn(s, args.stages[s], work);
    }
  }
}

}  // namespace based::cuda
