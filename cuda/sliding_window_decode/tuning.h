// How the sliding-window decode kernel cuts its work.
#pragma once

namespace based::cuda {

constexpr int kWindowDecodeThreads = 128;
constexpr int kWindowDecodeBlocksPerSM = 5;  // asked of the compiler: 96 registers a thread
constexpr int kWindowDecodeVectorBytes = 16;
constexpr int kWindowDecodeMaxHeadDim = 256;

// Keys, and as many values, that a thread has in flight.
template <int kChunks>
constexpr int kWindowDecodeKeys = kChunks == 1   ? 4
                                  : kChunks == 2 ? 2
                                                 : 1;

}  // namespace based::cuda
