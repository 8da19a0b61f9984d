// The tuning table of decode_block.
#pragma once

namespace based::cuda {

constexpr int kBlockTile = 128;      // rows of the weights that a CTA owns
constexpr int kBlockColumns = 64;    // columns that a copy brings
constexpr int kBlockCluster = 8;     // CTAs that can share K
constexpr int kBlockClusters = 16;   // at most
constexpr int kBlockOnTheirWay = 3;  // copies of weights that a CTA has asked for
constexpr int kBlockBarrierBytes = 2560;
constexpr int kBlockBatch = 2;  // groups of eight rows that are sent and finished at a time

// Blocks of weights that the threads' registers hold.
constexpr int block_held(int rows) { return rows <= 64 ? 4 : 3; }

// Blocks of x that a CTA has room for, at `rows` rows of x.
constexpr int block_x_slots(int rows) { return rows <= 32 ? 8 : rows <= 64 ? 6 : 4; }

}  // namespace based::cuda
