#include <algorithm>
#include <cmath>
#include <limits>

#include "based/ops.h"
#include "primitives/dispatch.h"
#include "taylor_feature_map/kernels.cuh"
#include "validate.h"

namespace based::cuda {
namespace {

Rows rows_of(const TensorView& view) {
  Rows rows{view.data, {1, 1, 1}, {0, 0, 0}};
  for (int i = 0; i < view.rank - 1; ++i) {
    rows.size[i + 4 - view.rank] = view.size[i];
    rows.stride[i + 4 - view.rank] = view.stride[i];
  }
  return rows;
}

int64_t row_count(const TensorView& view) {
  int64_t count = 1;
  for (int i = 0; i < view.rank - 1; ++i) count *= view.size[i];
  return count;
}

// Blocks of a one-dimensional grid, 0 when there are too many.
unsigned grid_size(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return blocks <= std::numeric_limits<int32_t>::max() ? static_cast<unsigned>(blocks) : 0;
}

Status too_large(const char* op) {
  return make_status(StatusCode::kUnsupported,
                     "%s: x: expected fewer than 2^31 blocks of work, got more", op);
}

}  // namespace

Status taylor_feature_map(const TaylorFeatureMapParams& p, void*, Stream stream) {
  const char* op = "taylor_feature_map";
  const Status status = validate(p);
  const int64_t rows = status.ok() ? row_count(p.x) : 0;
  if (!status.ok() || rows == 0) return status;
  const int D = static_cast<int>(p.x.size[p.x.rank - 1]), F = static_cast<int>(expanded_dim(D));
  const unsigned grid = grid_size(rows, kRowsPerBlock);
  if (grid == 0) return too_large(op);
  const int threads = std::min((F + 31) / 32 * 32, 256);
  return dispatch_element(op, p.x.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    taylor_feature_map_fwd_kernel<Element><<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(
        rows_of(p.x), rows_of(p.out), rows, D, F, static_cast<float>(std::sqrt(p.scale)));
    return launch_status(op);
  });
}

Status taylor_feature_map_backward(const TaylorFeatureMapBackwardParams& p, void*, Stream stream) {
  const char* op = "taylor_feature_map_backward";
  const Status status = validate(p);
  const int64_t rows = status.ok() ? row_count(p.x) : 0;
  if (!status.ok() || rows == 0) return status;
  const int D = static_cast<int>(p.x.size[p.x.rank - 1]);
  constexpr int kThreads = 256;
  const unsigned grid = grid_size(rows * D, kThreads);
  if (grid == 0) return too_large(op);
  return dispatch_element(op, p.x.dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    taylor_feature_map_bwd_kernel<Element>
        <<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            rows_of(p.dout), rows_of(p.x), rows_of(p.dx), rows, D,
            static_cast<float>(std::sqrt(p.scale)));
    return launch_status(op);
  });
}

}  // namespace based::cuda
