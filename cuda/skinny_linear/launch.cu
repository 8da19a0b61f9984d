// skinny_linear on Hopper.
#include <algorithm>

#include "based/ops.h"
#include "primitives/device.h"
#include "primitives/dispatch.h"
#include "primitives/tensor_map.h"
#include "skinny_linear/kernel.cuh"

namespace based::cuda {
namespace {

constexpr const char* kOp = "skinny_linear";

// fn(the smallest number of rows, as a constant, that a kernel has for so many)
template <class Fn>
Status dispatch_rows(int64_t rows, const Fn& fn) {
  if (rows <= 8) return fn(std::integral_constant<int, 8>{});
  if (rows <= 16) return fn(std::integral_constant<int, 16>{});
  if (rows <= 32) return fn(std::integral_constant<int, 32>{});
  static_assert(kSkinnyMaxRows == 64);
  return fn(std::integral_constant<int, 64>{});
}

template <class Element, int kRows, bool kSwiglu>
Status launch(const SkinnyLinearParams& p, SkinnyArgs a, Stream stream) {
  const int tiles = (static_cast<int>(p.weight.size[0]) + kSkinnyTile - 1) / kSkinnyTile;
  a.splits = 1;
  while (2 * a.splits <= std::min(kSkinnyMaxSplits, a.blocks) &&
         2 * a.splits * tiles <= kSkinnyCtas) {
    a.splits *= 2;
  }
  CUtensorMap weight, x;
  cudaError_t error = make_tensor_map(&weight, p.weight, kSkinnyTile / 2);
  if (error == cudaSuccess) error = make_tensor_map(&x, p.x, kRows);
  if (error != cudaSuccess) {
    return make_status(StatusCode::kCudaError, "%s: tensor map: expected success, got %s", kOp,
                       cudaGetErrorString(error));
  }
  const auto kernel = skinny_linear_kernel<Element, kRows, kSwiglu>;
  constexpr int kBytes = sizeof(SkinnyShared<kRows>);
  if (!allow_shared(reinterpret_cast<const void*>(kernel), kBytes)) {
    return make_status(StatusCode::kUnsupported,
                       "%s: device: expected %d bytes of shared memory for a block, got less", kOp,
                       kBytes);
  }
  launch_clusters<CUtensorMap, CUtensorMap, SkinnyArgs>(
      kernel, tiles, a.splits, kSkinnyThreads, kBytes, false, static_cast<cudaStream_t>(stream),
      weight, x, a);
  return launch_status(kOp);
}

}  // namespace

Status skinny_linear(const SkinnyLinearParams& p, void*, Stream stream) {
  Status status = validate(p);
  if (!status.ok()) return status;
  if (p.out.size[0] == 0 || p.out.size[1] == 0) return {};
  if (!runs_wgmma()) {
    return make_status(
        StatusCode::kUnsupported,
        "%s: device: expected a GPU of compute capability 9.0 and a build for sm_90a, "
        "got another",
        kOp);
  }
  if (std::max(p.weight.size[0], p.weight.size[1]) > 1 << 24) {
    return make_status(StatusCode::kUnsupported,
                       "%s: weight: expected at most 2^24 rows and columns, got more", kOp);
  }
  SkinnyArgs a{};
  a.bias = p.bias.data;  // null if not given
  a.out = p.out.data, a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.out.size[0]), a.columns = static_cast<int>(p.out.size[1]);
  a.vectors = rows_are_vectors(p.out, 4, 2);
  a.blocks = static_cast<int>((p.x.size[1] + kSkinnyBlock - 1) / kSkinnyBlock);
  const auto run = [&](auto type, auto rows) {
    using Element = typename decltype(type)::type;
    constexpr int kRows = decltype(rows)::value;
    return p.swiglu ? launch<Element, kRows, true>(p, a, stream)
                    : launch<Element, kRows, false>(p, a, stream);
  };
  return dispatch_rows(a.rows, [&](auto rows) {
    return p.x.dtype == DType::kFloat16 ? run(Type<__half>{}, rows)
                                        : run(Type<__nv_bfloat16>{}, rows);
  });
}

}  // namespace based::cuda
