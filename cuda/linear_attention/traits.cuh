// The tuning table of linear attention on tensor cores, and the order of its features.
//
// Inside the kernels the F = expanded_dim(D) rows of phi stand in blocks of D: x; x^2; then x_j
// x_{(j+r) mod D} for r = 1 ... D/2 (the last one keeps j < D/2); then the constant; zeros up to a
// multiple of 16. That is the public order with the constant moved to the end. Products are of raw
// x; the coefficients of phi(q) phi(k) - scale, scale^2/2, scale^2, 1 - are applied to the fp32
// state.
#pragma once

#include <cstdint>

#include "based/params.h"
#include "primitives/mma.cuh"

namespace based::cuda::linear {

constexpr int kRows = 64;    // rows of a warpgroup's product: its queries, or keys, of a chunk
constexpr int kChunk = 128;  // tokens that share a state: two warpgroups' rows
constexpr int kThreads = 256;
constexpr int kTileV = 64;     // columns of v that a CTA handles; wider heads are split
constexpr int kExtended = 72;  // kTileV and 8 columns more, of which the first is the denominator's

template <class Element_, int D_>
struct Traits {
  using Element = Element_;
  static constexpr int D = D_, kD = (D + 15) / 16 * 16;       // kD: columns of a q or k tile
  static constexpr int kConstant = int(expanded_dim(D)) - 1;  // the constant's place
  static constexpr int kF = (kConstant + 16) / 16 * 16;
  static constexpr int kGroups = kF / 8;
  static constexpr int kPhiTokens = D == 32 ? 32 : 128;  // tokens whose phi is kept at once
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static constexpr int kIncrementStages = 4;
  static constexpr int kBackwardStages = D <= 16 ? 2 : 1;  // chunks in shared memory
  static constexpr int kGradientN = D == 16 ? 80 : 48;  // features whose gradient is kept at once
  static_assert(D % 8 == 0 && kF % 16 == 0 && kGroups % (kThreads / kPhiTokens) == 0);
};

// What 8 neighbouring features are.
enum class GroupKind { kLinear, kProduct, kMixed, kConstant, kZero };
struct Group {
  GroupKind kind;
  int rotation, j;  // products x_j x_{j + rotation} from this j on
};

template <int D>
__host__ __device__ constexpr Group feature_group(int g) {
  const int first = 8 * g, rotation = first / D - 1, j = first % D;
  if (first < D) return {GroupKind::kLinear, 0, j};
  if (2 * rotation < D || j + 8 <= D / 2) return {GroupKind::kProduct, rotation, j};
  if (j < D / 2) return {GroupKind::kMixed, rotation, j};  // four products, then the constant
  if (j == D / 2) return {GroupKind::kConstant, 0, 0};
  return {GroupKind::kZero, 0, 0};
}

}  // namespace based::cuda::linear
