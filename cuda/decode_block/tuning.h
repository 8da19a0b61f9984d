// The tuning table of decode_block.
#pragma once

#include <cstddef>

namespace based::cuda {

constexpr int kBlockTile = 128;    // rows of the weights that a CTA has at a time
constexpr int kBlockColumns = 64;  // columns that a copy brings
constexpr int kBlockCluster = 8;   // CTAs that can share K
constexpr int kBlockClusters = 16;
constexpr int kBlockBarrierBytes = 1024;

// Blocks of x that a CTA has room for, at `rows` rows of x.
constexpr int block_x_slots(int rows) { return rows <= 32 ? 8 : 4; }

}  // namespace based::cuda
