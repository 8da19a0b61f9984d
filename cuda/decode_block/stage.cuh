// decode_block: four products that wait for each other, in one kernel.
//
// A stage is out (N, M) = x (N, K) weight (M, K)^T and what follows it. Each is what the next one
// reads, so all CTAs of the grid run at the same time, and count up in global memory what they have
// finished of a stage. What a stage has to wait for is short beside what it has to read, its
// weights; so each CTA has a ring of blocks of weights that is filled without regard to stages, and
// memory is busy while the stages change.
//
// A CTA takes tiles of 128 rows of the weights (with SwiGLU 64 of values and 64 of their gates) and
// a span of K. The CTAs that share K lie in one cluster; each adds up its share of their sums
// through distributed shared memory, in the order of the spans. A norm is not computed before a
// product but with it: x times the norm's weight is what the stage before leaves, with sums of
// squares, and the product's rows are divided by the root mean square.
#pragma once

#include <cuda.h>

#include <algorithm>

#include "based/params.h"
#include "decode_block/tuning.h"
#include "primitives/bulk_copy.cuh"
#include "primitives/cluster.cuh"
#include "primitives/early_launch.cuh"
#include "primitives/element.cuh"
#include "primitives/mma.cuh"
#include "primitives/tensor_copy.cuh"
#include "primitives/vector.cuh"

namespace based::cuda {

using BlockElement = __nv_bfloat16;

struct BlockStage {
  CUtensorMap weight, x;  // boxes of 64 and of kRows rows
  int columns;            // of out
  int tiles, blocks;      // of the weights: along M, and along K
  int splits;             // CTAs that share K
  bool swiglu;
  const BlockElement* bias;  // (columns,) or null
  const float* squares;      // null, or of x: (tiles of the stage before, kDecodeBlockMaxRows)
  int square_tiles;
  BlockElement* out;  // rows out_stride apart
  int64_t out_stride;
  bool vectors;  // out can be written four elements at a time
  // If norm is given: residual_out = residual + the product, out = residual_out * norm.
  const BlockElement* norm;
  const float* residual;
  int64_t residual_stride;
  float* residual_out;  // rows of `columns`
  float* squares_out;   // sums of squares of residual_out in a tile
};

constexpr int kBlockStages = 4;

struct BlockArgs {
  BlockStage stages[kBlockStages];
  int rows;
  float eps;
  unsigned* counters;  // [s]: CTAs that have finished a tile of stage s; the last: the kernel
};

enum BlockThreads { kBlockComputing = 256, kBlockWeights = 256, kBlockX = 288, kBlockScales = 320 };
constexpr int kBlockThreads = 352;  // eight warps that compute, and three that serve them

// Rings of blocks: rows of 128 bytes in wgmma's 128-byte swizzle. The sums lie where x does: all x
// of a tile was read when they are stored, and they were when the next tile's is copied.
template <int kRows>
struct BlockShared {
  static constexpr int kXSlots = block_x_slots(kRows), kXBytes = kRows * 128;
  static constexpr int kSumsStride = kBlockTile + 4;  // no two threads of a warp hit one bank
  static constexpr int kSumsBytes = kRows * kSumsStride * 4;
  static constexpr int kXRing = (std::max(kXSlots * kXBytes, kSumsBytes) + 1023) / 1024 * 1024;
  static constexpr int kWeightBytes = kBlockTile * 128;
  static constexpr int kSlots = (227 * 1024 - kBlockBarrierBytes - kXRing) / kWeightBytes;

  alignas(1024) char weights[kSlots * kWeightBytes];
  alignas(1024) char x[kXRing];
  Mbarrier weights_full[kSlots], weights_empty[kSlots];
  Mbarrier x_full[kXSlots], x_empty[kXSlots];
  Mbarrier sums_full, sums_empty;
  float scales[kRows];  // 1 / root mean square, of the rows that this CTA finishes

  // Row of x, row of the tile.
  __device__ __forceinline__ uint32_t sum(int row, int tile_row) const {
    return shared_address(x) + (row * kSumsStride + tile_row) * 4;
  }
  __device__ __forceinline__ void init() {
    for (Mbarrier& barrier : weights_full) barrier.init(1);
    for (Mbarrier& barrier : x_full) barrier.init(1);
    for (Mbarrier& barrier : weights_empty) barrier.init(8);  // warps that read
    for (Mbarrier& barrier : x_empty) barrier.init(8);
    sums_full.init(kBlockCluster), sums_empty.init(kBlockCluster);
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

// What a CTA does of a tile: blocks first ... first + count - 1 of K, and in the end the rows
// begin ... end - 1 of the sums.
struct BlockWork {
  int tile, part, leader;  // part: of splits; leader: the cluster's rank of part 0
  int first, count;
};

// fn(s, stage, work) for all that this CTA does, in order.
template <class Fn>
__device__ __forceinline__ void for_each_tile(const BlockArgs& args, const Fn& fn) {
  const int cluster = blockIdx.x / kBlockCluster, rank = blockIdx.x % kBlockCluster;
#pragma unroll 1
  for (int s = 0; s < kBlockStages; ++s) {
    const BlockStage& stage = args.stages[s];
    const int groups = gridDim.x / stage.splits;
    BlockWork work;
    work.part = rank % stage.splits, work.leader = rank - work.part;
    work.first = work.part * stage.blocks / stage.splits;
    work.count = (work.part + 1) * stage.blocks / stage.splits - work.first;
    // Where not all groups have a tile, they are others in every stage.
    const int group = (cluster * kBlockCluster + rank) / stage.splits + s * groups / kBlockStages;
#pragma unroll 1
    for (work.tile = group % groups; work.tile < stage.tiles; work.tile += groups) {
      fn(s, stage, work);
    }
  }
}

}  // namespace based::cuda
