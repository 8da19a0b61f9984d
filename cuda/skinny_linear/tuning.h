// The tuning table of skinny_linear.
#pragma once

namespace based::cuda {

constexpr int kSkinnyTile = 128;     // rows of the weights that a CTA owns
constexpr int kSkinnyBlock = 64;     // columns that a copy brings
constexpr int kSkinnyMaxSplits = 8;  // CTAs of a cluster, which share K
// CTAs to aim at, one an SM. A cluster lies within a part of 16 or 18 SMs: powers of two fill
// these.
constexpr int kSkinnyCtas = 128;

// Blocks that a CTA has room for, at `rows` rows of x.
constexpr int skinny_stages(int rows) { return rows <= 16 ? 12 : rows <= 32 ? 10 : 8; }

}  // namespace based::cuda
