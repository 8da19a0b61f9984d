// How the linear-attention decode kernels cut their work.
#pragma once

namespace based::cuda {

constexpr int kDecodeThreads = 256;    // at most; a block is whole rows of the state side by side
constexpr int kDecodeMaxGroups = 32;   // rows of the state that a block holds side by side
constexpr int kDecodeBlocksPerSM = 5;  // what shared memory allows; 48 registers a thread
constexpr int kDecodeStages = 1;       // tiles of the state on their way to shared memory
constexpr int kDecodeTileBytes = 40 * 1024;
constexpr int kDecodeFoldTokens = 4;  // waiting tokens that a pass over a tile adds
constexpr int kDecodeMaxFeatureDim = 64;
constexpr int kDecodeMaxHeadDim = 1024;
constexpr int kDecodeMaxPending = 64;

}  // namespace based::cuda
