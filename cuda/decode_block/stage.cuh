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
  int splits;             // CTAs that share K
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

constexpr int kBlockStages = 4;

struct BlockArgs {
  BlockStage stages[kBlockStages];
  BlockConvolution convolution;  // of the stage that ends so
  int rows, width;               // of what is normed
  float eps;
  unsigned* counters;  // [s]: CTAs that have finished a tile of stage s; the last: the kernel
};

enum BlockThreads { kBlockComputing = 256, kBlockWeights = 256, kBlockX = 288, kBlockScales = 320 };
constexpr int kBlockThreads = 352;  // eight warps that compute, and three that serve them

// What a CTA does of a stage: blocks first ... first + count - 1 of K of a tile, and in the end
// groups begin ... end - 1 of eight rows of the sums.
struct BlockWork {
  int tile, part, leader;  // part: of splits; leader: the cluster's rank of part 0
  int first, count;
  int groups;  // of all rows
  int begin, end;

  __device__ __forceinline__ BlockWork(const BlockArgs& args, int s) {
    const BlockStage& stage = args.stages[s];
    const int rank = blockIdx.x % kBlockCluster, teams = gridDim.x / stage.splits;
    part = rank % stage.splits, leader = rank - part;
    first = part * stage.blocks / stage.splits;
    count = (part + 1) * stage.blocks / stage.splits - first;
    // Where not all teams have a tile, they are others in every stage.
    tile = (blockIdx.x / stage.splits + s * teams / kBlockStages) % teams;
    groups = (args.rows + 7) / 8;
    begin = part * groups / stage.splits, end = (part + 1) * groups / stage.splits;
  }
};

// Rings of blocks: rows of 128 bytes in wgmma's 128-byte swizzle.
template <int kRows>
struct BlockShared {
  static constexpr int kXSlots = block_x_slots(kRows), kXBytes = kRows * 128;
  static constexpr int kWeightBytes = kBlockTile * 128;
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
  Mbarrier sums_full, states_full;
  // Of the rows that this CTA finishes:
  float scales[kRows];   // 1 / root mean square
  int64_t slots[kRows];  // of the convolution's states; -1: skipped; kNone: there is no such slot
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
    const int in_share = row - work.begin * 8, bytes = state_bytes(taps) + 16;
    return reinterpret_cast<BlockElement*>(own_place(work) + in_share * bytes);
  }
  __device__ __forceinline__ char* own_place(const BlockWork& work) {
    return sums + work.part * (work.end - work.begin) * kGroupBytes;
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
    sums_full.init(1);
    states_full.init(32);
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
  for (int s = 0; s < kBlockStages; ++s) {
    const BlockWork work(args, s);
    if (work.tile < args.stages[s].tiles) fn(s, args.stages[s], work);
  }
}

}  // namespace based::cuda
