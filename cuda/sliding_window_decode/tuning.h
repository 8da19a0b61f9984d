// How the sliding-window decode kernel cuts its work.
#pragma once

namespace based::cuda {

constexpr int kWindowDecodeThreads = 128;
// Asked of the compiler: 96 registers a thread, 128 for fp32, most of them keys and values.
template <class Element>
constexpr int kWindowDecodeBlocksPerSM = sizeof(Element) == 2 ? 5 : 4;
constexpr int kWindowDecodeVectorBytes = 16;
constexpr int kWindowDecodeMaxHeadDim = 256;

// Keys that a thread takes at a time, and as many values; each is kChunks vectors of a lane.
template <int kChunks>
constexpr int kWindowDecodeKeys = kChunks < 8 ? 8 / kChunks : 1;

}  // namespace based::cuda
