// Tuning of sliding-window attention, measured at W = 128 on an H200.
#pragma once

namespace based::cuda {

enum class WindowPass { kForward, kQueries, kKeys };  // out; dq and delta; dk and dv

struct WindowTuning {
  int warps;       // that compute, 16 rows each; fewer on a GPU that is short of shared memory
  int columns;     // columns of a tile
  int stages;      // tiles in flight
  bool registers;  // row operands live in registers, not in shared memory
  int blocks;      // CTAs on a multiprocessor at least (bounds the registers)
};

// For element size in bytes and head_dim (padded) kV.
constexpr WindowTuning window_tuning(WindowPass pass, int element_bytes, int kV) {
  const bool forward = pass == WindowPass::kForward;
  if (element_bytes == 4) return {7, kV > 64 ? 16 : 32, 2, false, 1};
  if (kV <= 64) return forward ? WindowTuning{7, 32, 6, true, 2} : WindowTuning{5, 32, 4, true, 2};
  if (kV <= 128) return forward ? WindowTuning{5, 32, 4, true, 2} : WindowTuning{7, 32, 4, true, 1};
  return {7, 16, 3, false, 1};
}

template <class Tile_, WindowPass kPass>
struct WindowTraits {
  using Tile = Tile_;
  using Element = typename Tile::Element;
  static constexpr WindowTuning kTuning = window_tuning(kPass, sizeof(Element), Tile::kV);
  static constexpr bool kBackward = kPass != WindowPass::kForward;
  static constexpr int kColumns = kTuning.columns, kStages = kTuning.stages;
  static constexpr bool kRegisters = kTuning.registers;
  static constexpr int kThreads = (kTuning.warps + 1) * 32, kBlocks = kTuning.blocks;
  // Columns of the gradients that are summed up at a time: two of them have to fit the registers.
  static constexpr int kOut = kBackward && Tile::kV > 128 ? 128 : Tile::kV;
  static constexpr int kRowTiles = kBackward ? 2 : 1;              // q, or q and dout, or k and v
  static constexpr bool kHasVectors = kPass == WindowPass::kKeys;  // lse and delta of the columns

  static constexpr int kTileBytes = kColumns * Tile::kLd * int(sizeof(Element));
  static constexpr int kVectorBytes = kHasVectors ? kColumns * 4 : 0;
  static constexpr int kStageBytes = 2 * kTileBytes + 2 * kVectorBytes;
  static constexpr int kWarpBytes = 16 * Tile::kLd * int(sizeof(Element));  // 16 rows
  // Row tiles; stages, a flag for each of their columns, two barriers for each stage.
  static constexpr int shared_bytes(int warps) {
    return kRowTiles * warps * kWarpBytes + kStages * (kStageBytes + kColumns * 4 + 16);
  }
  static_assert(kColumns % 16 == 0 && Tile::kV % kOut == 0);
};

}  // namespace based::cuda
