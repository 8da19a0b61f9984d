// decode_block on Hopper.
#include <algorithm>
#include <array>
#include <map>

#include "based/ops.h"
#include "decode_block/kernel.cuh"
#include "primitives/device.h"
#include "primitives/dispatch.h"
#include "primitives/tensor_map.h"

namespace based::cuda {
namespace {

constexpr const char* kOp = "decode_block";

// Of the stages.
constexpr const char* kWeights[] = {"out_weight", "fc1", "fc2", "next_weight"};
std::array<const TensorView*, kBlockStages> weights_of(const DecodeBlockParams& p) {
  return {&p.out_weight, &p.fc1, &p.fc2, &p.next_weight};
}

int tiles_of(int64_t columns, int tile) { return static_cast<int>((columns + tile - 1) / tile); }

// The parts of the workspace, one behind the other.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(static_cast<char*>(begin)) {}
  template <class T>
  T* take(int64_t count) {
    T* const part = reinterpret_cast<T*>(begin_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* begin_;
  int64_t used_ = 0;
};

// What the stages leave for each other.
struct Between {
  BlockElement *normed, *activations, *next;  // (N, d), (N, m), (N, d)
  float *squares, *next_squares;              // (tiles of d, kDecodeBlockMaxRows)

  Between(const DecodeBlockParams& p, Workspace& workspace) {
    const int64_t rows = p.x.size[0], width = p.x.size[1];
    const int64_t sums = tiles_of(width, kBlockTile) * kDecodeBlockMaxRows;
    normed = workspace.take<BlockElement>(rows * width);
    activations = workspace.take<BlockElement>(rows * p.fc2.size[1]);
    next = workspace.take<BlockElement>(rows * width);
    squares = workspace.take<float>(sums);
    next_squares = workspace.take<float>(sums);
  }
};

template <class T>
T* pointer(const TensorView& view) {
  return static_cast<T*>(view.data);  // null if not given
}

// Whether elements 0, 2, ... of every row start at multiples of two elements' size.
bool starts_pairs(const TensorView& rows, size_t bytes) {
  return (rows.size[0] <= 1 || rows.stride[0] % 2 == 0) &&
         reinterpret_cast<uintptr_t>(rows.data) % (2 * bytes) == 0;
}

// out <- x weight^T
cudaError_t product(BlockStage& s, const TensorView& x, const TensorView& weight,
                    const TensorView& out, BlockEnding ending, int clusters, int box_rows) {
  const int ctas = clusters * kBlockCluster;
  s.columns = static_cast<int>(out.size[1]);
  s.blocks = tiles_of(weight.size[1], kBlockColumns);
  s.ending = ending;
  s.tiles = tiles_of(s.columns, s.gated() ? kBlockTile / 2 : kBlockTile);
  s.passes = s.tiles / ctas;
  const int left = s.tiles - s.passes * ctas;
  s.splits = kBlockCluster;
  while (s.splits > 1 && (s.splits > s.blocks || ctas / s.splits < left)) s.splits /= 2;
  s.out = pointer<BlockElement>(out), s.out_stride = out.stride[0];
  s.out_pairs = s.columns % 2 == 0 && starts_pairs(out, sizeof(BlockElement));
  const cudaError_t error = s.gated() ? make_paired_tensor_map(&s.weight, weight, kBlockTile)
                                      : make_tensor_map(&s.weight, weight, kBlockTile);
  return error == cudaSuccess ? make_tensor_map(&s.x, x, box_rows) : error;
}

void add_to_residual(BlockStage& s, const TensorView& residual, const TensorView& sum,
                     const TensorView& norm, float* squares) {
  s.residual = pointer<const float>(residual), s.residual_stride = residual.stride[0];
  s.residual_pairs = starts_pairs(residual, sizeof(float));
  s.residual_out = pointer<float>(sum);
  s.norm = pointer<const BlockElement>(norm), s.squares_out = squares;
}

BlockConvolution convolution(const DecodeBlockParams& p) {
  BlockConvolution conv{};
  conv.weight = pointer<const BlockElement>(p.conv_weight);
  conv.state = pointer<BlockElement>(p.conv_state);
  conv.weight_stride = p.conv_weight.stride[0], conv.state_stride = p.conv_state.stride[0];
  conv.slots = p.conv_state.size[0], conv.indices = index_vector(p.state_indices);
  conv.taps = static_cast<int>(p.conv_weight.size[1]);
  return conv;
}

// Clusters that can run at the same time; asked for once.
template <class Kernel>
int clusters_at_once(Kernel kernel, int bytes) {
  thread_local std::map<std::pair<const void*, int>, int> known;  // of a kernel on a device
  int device = 0;
  cudaGetDevice(&device);
  int& clusters = known[{reinterpret_cast<const void*>(kernel), device}];
  if (clusters == 0) {
    cudaLaunchAttribute size = {};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {kBlockCluster, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(kBlockClusters * kBlockCluster), config.blockDim = dim3(kBlockThreads);
    config.dynamicSmemBytes = bytes, config.attrs = &size, config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      clusters = 0;
      cudaGetLastError();
    }
  }
  return std::min(clusters, kBlockClusters);
}

template <int kRows>
Status launch(const DecodeBlockParams& p, const Between& between, Stream stream) {
  const auto kernel = decode_block_kernel<kRows>;
  constexpr int kBytes = sizeof(BlockShared<kRows>);
  const bool allowed = allow_shared(reinterpret_cast<const void*>(kernel), kBytes);
  const int clusters = allowed ? clusters_at_once(kernel, kBytes) : 0;
  if (clusters == 0) {
    return make_status(StatusCode::kUnsupported,
                       "%s: device: expected %d bytes of shared memory for each block of a "
                       "cluster of %d, got less",
                       kOp, kBytes, kBlockCluster);
  }
  const int64_t rows = p.x.size[0], width = p.x.size[1], inner = p.fc2.size[1];
  const TensorView normed = contiguous_view(between.normed, DType::kBFloat16, rows, width);
  const TensorView activations =
      contiguous_view(between.activations, DType::kBFloat16, rows, inner);
  const TensorView next = contiguous_view(between.next, DType::kBFloat16, rows, width);

  BlockArgs args{};
  args.rows = static_cast<int>(rows), args.width = static_cast<int>(width);
  args.eps = static_cast<float>(p.eps);
  args.counters = pointer<unsigned>(p.counters);
  const bool convolves = p.conv_weight.rank >= 0;
  if (convolves) args.convolution = convolution(p);
  auto& [attend, up, down, project] = args.stages;
  cudaError_t error =
      product(attend, p.mixed, p.out_weight, normed, BlockEnding::kLinear, clusters, kRows);
  add_to_residual(attend, p.x, p.x_out, p.norm, between.squares);
  attend.bias = pointer<const BlockElement>(p.out_bias);
  if (error == cudaSuccess)
    error = product(up, normed, p.fc1, activations, BlockEnding::kSwiglu, clusters, kRows);
  up.squares = between.squares, up.square_tiles = attend.tiles;
  if (error == cudaSuccess)
    error = product(down, activations, p.fc2, next, BlockEnding::kLinear, clusters, kRows);
  add_to_residual(down, p.x_out, p.x_out, p.next_norm, between.next_squares);
  if (error == cudaSuccess) {
    error = product(project, next, p.next_weight, p.out,
                    convolves ? BlockEnding::kConvolution : BlockEnding::kLinear, clusters, kRows);
  }
  project.squares = between.next_squares, project.square_tiles = down.tiles;
  project.bias = pointer<const BlockElement>(p.next_bias);
  if (error != cudaSuccess) {
    return make_status(StatusCode::kCudaError, "%s: tensor map: expected success, got %s", kOp,
                       cudaGetErrorString(error));
  }
  const int ctas = clusters * kBlockCluster;
  for (int s = 0; s < kBlockStages; ++s) {
    const TensorView& weight = *weights_of(p)[s];
    const BlockStage& stage = args.stages[s];
    const bool in_one_pass = stage.norm != nullptr || stage.ending == BlockEnding::kConvolution;
    if (in_one_pass && stage.tiles > ctas) {
      return make_status(StatusCode::kUnsupported, "%s: %s: expected at most %d rows, got %lld",
                         kOp, kWeights[s], ctas * kBlockTile,
                         static_cast<long long>(weight.size[0]));
    }
  }
  launch_clusters<BlockArgs>(kernel, clusters, kBlockCluster, kBlockThreads, kBytes, true,
                             static_cast<cudaStream_t>(stream), args);
  return launch_status(kOp);
}

}  // namespace

int64_t decode_block_workspace_size(const DecodeBlockParams& p) {
  if (!validate(p).ok()) return 0;
  Workspace workspace(nullptr);
  Between(p, workspace);
  return workspace.used();
}

Status decode_block(const DecodeBlockParams& p, void* memory, Stream stream) {
  Status status = validate(p);
  if (!status.ok()) return status;
  if (p.x.size[0] == 0) return {};
  if (!runs_wgmma()) {
    return make_status(
        StatusCode::kUnsupported,
        "%s: device: expected a GPU of compute capability 9.0 and a build for sm_90a, got another",
        kOp);
  }
  for (int s = 0; s < kBlockStages; ++s) {
    const TensorView& weight = *weights_of(p)[s];
    const int64_t most = std::max(weight.size[0], weight.size[1]);
    if (most > 1 << 24) {
      return make_status(StatusCode::kUnsupported,
                         "%s: %s: expected at most 2^24 rows and columns, got %lld", kOp,
                         kWeights[s], static_cast<long long>(most));
    }
  }
  Workspace workspace(memory);
  const Between between(p, workspace);
  const int64_t rows = p.x.size[0];
  if (rows <= 8) return launch<8>(p, between, stream);
  if (rows <= 16) return launch<16>(p, between, stream);
  if (rows <= 32) return launch<32>(p, between, stream);
  if (rows <= 64) return launch<64>(p, between, stream);
  static_assert(kDecodeBlockMaxRows == 128);
  return launch<128>(p, between, stream);
}

}  // namespace based::cuda
