// How the sliding-window decode kernel cuts its work.
#pragma once

namespace based::cuda {

constexpr int kWindowDecodeThreads = 128;
constexpr int kWindowDecodeBlocksPerSM = 8;  // asked of the compiler: 64 registers a thread
constexpr int kWindowDecodeVectorBytes = 16;
constexpr int kWindowDecodeMaxHeadDim = 256;

// Keys that a thread has on their way: stages of so many.
constexpr int kWindowDecodeStages = 2;
template <int kChunks>
constexpr int kWindowDecodeKeys = kChunks == 1 ? 2 : 1;

}  // namespace based::cuda
