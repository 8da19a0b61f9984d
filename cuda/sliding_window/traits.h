// Tuning of sliding-window attention, measured at W = 128.
#pragma once

namespace based::cuda {

enum class WindowPass { kForward, kQueries, kKeys };  // out; dq and delta; dk and dv

constexpr int kBlock = 16;  // rows of a strip, and columns that are loaded at a time

struct WindowTuning {
  int warps;       // that compute
  int step;        // blocks of columns that a warp takes at a time
  int stages;      // blocks of columns in shared memory; fewer, then fewer warps, where it is short
  bool registers;  // row operands live in registers, not in shared memory
  int blocks;      // CTAs on a multiprocessor at least (bounds the registers)
};

// For element size in bytes and head_dim (padded) kV.
constexpr WindowTuning window_tuning(WindowPass pass, int element_bytes, int kV) {
  const bool forward = pass == WindowPass::kForward;
  if (element_bytes == 4) return {7, 1, kV > 128 ? 3 : 8, false, 1};
  if (kV <= 64) return forward ? WindowTuning{7, 3, 18, true, 2} : WindowTuning{11, 1, 24, true, 1};
  if (kV <= 128) {
    return forward ? WindowTuning{15, 1, 17, false, 1} : WindowTuning{7, 1, 18, true, 1};
  }
  return {7, 1, 6, false, 1};
}

template <class Tile_, WindowPass kPass>
struct WindowTraits {
  using Tile = Tile_;
  using Element = typename Tile::Element;
  static constexpr WindowTuning kTuning = window_tuning(kPass, sizeof(Element), Tile::kV);
  static constexpr bool kBackward = kPass != WindowPass::kForward;
  static constexpr int kStep = kTuning.step;
  static constexpr bool kRegisters = kTuning.registers;
  static constexpr int kThreads = (kTuning.warps + 1) * 32, kBlocks = kTuning.blocks;
  // Columns of the gradients that are summed up at a time: two of them have to fit the registers.
  static constexpr int kOut = kBackward && Tile::kV > 128 ? 128 : Tile::kV;
  static constexpr int kRowTiles = kBackward ? 2 : 1;              // q, or q and dout, or k and v
  static constexpr bool kHasVectors = kPass == WindowPass::kKeys;  // lse and delta of the columns

  static constexpr int kTileBytes = kBlock * Tile::kLd * int(sizeof(Element));
  static constexpr int kStageBytes = 2 * kTileBytes + (kHasVectors ? 2 * kBlock * 4 : 0);
  static constexpr int kWarpBytes = kRowTiles * kTileBytes;  // the strip of a warp
  // Strips; stages, a flag for each of their columns, two barriers for each stage.
  static constexpr int shared_bytes(int warps, int stages) {
    return warps * kWarpBytes + stages * (kStageBytes + kBlock * 4 + 16);
  }
  static_assert(kTuning.stages >= kStep && Tile::kV % kOut == 0);
};

}  // namespace based::cuda
