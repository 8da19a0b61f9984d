// Tokens of no sequence: cu_seqlens lies on the GPU unchecked, and bounds that do not begin at 0,
// end at T and never fall leave tokens that no kernel computes. This pass comes before the others.
// With such bounds, and only then, it makes every result NaN; what is computed replaces that.
#pragma once

#include <initializer_list>

#include "primitives/dispatch.h"
#include "primitives/packed.cuh"

namespace based::cuda::linear {

// The rows (T, H) of a result, in 4-byte words.
struct StrayRows {
  uint32_t* data;
  int64_t token, head;  // strides
  int words;
};

constexpr int kMostStrayRows = 3, kStrayBlocks = 32;

struct StrayArguments {
  IndexVector bounds;  // (N+1,)
  int64_t seqlen;
  int heads;
  StrayRows rows[kMostStrayRows];  // no data past the last one
};

static __global__ void __launch_bounds__(256)
    stray_tokens_kernel(const __grid_constant__ StrayArguments a) {
  const auto bound = [&](int64_t i) { return min(max(a.bounds[i], int64_t(0)), a.seqlen); };
  const int64_t last = a.bounds.size - 1;
  bool bad = threadIdx.x == 0 && (bound(0) != 0 || bound(last) != a.seqlen);
  for (int64_t i = threadIdx.x; i < last; i += blockDim.x) bad = bad || bound(i) > bound(i + 1);
  if (!__syncthreads_or(bad)) return;
  for (const StrayRows& rows : a.rows) {
    if (rows.data == nullptr) break;
    const int64_t count = a.seqlen * a.heads * rows.words;
    for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += gridDim.x * blockDim.x) {
      const int64_t row = i / rows.words;
      rows.data[row / a.heads * rows.token + row % a.heads * rows.head + i % rows.words] = ~0u;
    }
  }
}

// `results` are (1, T, H, width) of whole words in every row.
inline Status fill_stray_tokens(const char* op, const TensorView& cu_seqlens,
                                std::initializer_list<TensorView> results, Stream stream) {
  if (cu_seqlens.rank < 0) return {};
  StrayArguments a{index_vector(cu_seqlens), 0, 0, {}};
  StrayRows* rows = a.rows;
  for (const TensorView& view : results) {
    const int elements = view.dtype == DType::kFloat32 ? 1 : 2;  // of a word
    a.seqlen = view.size[1], a.heads = int(view.size[2]);
    *rows++ = {static_cast<uint32_t*>(view.data), view.stride[1] / elements,
               view.stride[2] / elements, int(view.size[3] / elements)};
  }
  stray_tokens_kernel<<<kStrayBlocks, 256, 0, static_cast<cudaStream_t>(stream)>>>(a);
  return launch_status(op);
}

}  // namespace based::cuda::linear
