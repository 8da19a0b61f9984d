// How the linear-attention decode kernels cut their work.
#pragma once

namespace based::cuda {

constexpr int kDecodeThreads = 256;  // at most; a block is whole rows of the state side by side
// Asked of the compiler: 64 registers a thread, 80 where the deferred form folds.
template <bool kDeferred>
constexpr int kDecodeBlocksPerSM = kDeferred ? 3 : 4;
constexpr int kDecodeMaxGroups = 32;  // rows of the state that a block holds side by side
constexpr int kDecodeBatch = 8;       // rows a thread has in flight
constexpr int kDecodeVector = 4;      // columns of a thread: 16 bytes, or 1 where unaligned
constexpr int kFoldTokens = 16;       // pending tokens whose phi is in shared memory at a time
constexpr int kDecodeMaxFeatureDim = 64;
constexpr int kDecodeMaxPending = 64;

}  // namespace based::cuda
