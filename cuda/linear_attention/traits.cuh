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

constexpr int kChunk = 64;     // tokens that share a state: rows of one warpgroup's product
constexpr int kTileV = 64;     // columns of v that a CTA handles; wider heads are split
constexpr int kExtended = 72;  // kTileV and 8 columns more, of which the first is the denominator's
constexpr int kWarpgroup = 128;

template <class Element_, int D_>
struct Traits {
  using Element = Element_;
  static constexpr int D = D_, kD = (D + 15) / 16 * 16;       // kD: columns of a q or k tile
  static constexpr int kConstant = int(expanded_dim(D)) - 1;  // the constant's place
  static constexpr int kF = (kConstant + 16) / 16 * 16;
  static constexpr int kGroups = kF / 8;
  // A warpgroup holds the state of one slice of the features in registers.
  static constexpr int kSlices = D <= 16 ? 1 : D <= 24 ? 3 : 4;
  static constexpr int kSliceF = kF / kSlices, kSliceGroups = kSliceF / 8;
  static constexpr int kThreads = kSlices * kWarpgroup;
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static constexpr int kForwardCtas = D <= 16 ? 2 : 1;  // CTAs an SM should hold
  static constexpr int kBackwardCtas = D <= 16 ? 2 : 1;
  static constexpr int kBackwardStages = D <= 24 ? 2 : 1;  // chunks in shared memory
  static constexpr int kGradientN = D == 32 ? 48 : kSliceF / (D == 16 ? 2 : 1);  // dphi at once
  static_assert(D % 8 == 0 && kF % (16 * kSlices) == 0 && kSliceF % 16 == 0);
  static_assert(kGroups % (2 * kSlices) == 0);
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
