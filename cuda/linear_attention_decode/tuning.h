// How the linear-attention decode kernels cut their work.
#pragma once

namespace based::cuda {

constexpr int kDecodeThreads = 160;     // of a block, if V is no wider
constexpr int kDecodeMaxThreads = 256;  // of any block
constexpr int kDecodeMinBlocks = 3;     // of that size an SM: five of 160, with 80 registers
constexpr int kDecodeMaxGroups = 32;    // rows of the state that a block holds side by side
constexpr int kDecodeRows = 4;          // rows of a tile that a thread loads at once
constexpr int kDecodeTileBytes = 40 * 1024;
// Where a tile takes in waiting tokens: rows a thread, tokens between barriers and without a
// branch.
constexpr int kDecodeFoldRows = 4;
constexpr int kDecodeFoldTokens = 8;
constexpr int kDecodeFoldUnroll = 4;
constexpr int kDecodeMaxFeatureDim = 64;
constexpr int kDecodeMaxHeadDim = 1024;
constexpr int kDecodeMaxPending = 64;

}  // namespace based::cuda
