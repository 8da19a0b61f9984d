// How the sliding-window decode kernel cuts its work.
#pragma once

namespace based::cuda {

constexpr int kWindowDecodeThreads = 128;
// Asked of the compiler: 48 registers a thread, 96 where a key is several vectors of a lane.
template <int kChunks>
constexpr int kWindowDecodeBlocksPerSM = kChunks == 1 ? 10 : 5;
constexpr int kWindowDecodeVectorBytes = 16;
constexpr int kWindowDecodeMaxHeadDim = 256;

constexpr int kWindowDecodeStages = 2;  // keys that a thread has on their way, and as many values

}  // namespace based::cuda
