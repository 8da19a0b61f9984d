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

// Of the stages.
constexpr const char* kWeights[] = {"out_weight", "fc1", "fc2", "next_weight"};
std::array<const TensorView*, kBlockStages> weights_of(const DecodeBlockWeights& block) {
  return {&block.out_weight, &block.fc1, &block.fc2, &block.next_weight};
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

// What the stages leave for each other, the same place for every block: what it held was read two
// stages ago.
struct Between {
  BlockElement *normed, *activations, *next;  // (N, d), (N, m), (N, d)
  BlockElement* mixed;                        // (N, C): of the next block
  float *squares, *next_squares;              // (tiles of d, kDecodeBlockMaxRows)

  Between(const DecodeBlockParams& p, Workspace& workspace) {
    const int64_t rows = p.x.size[0], width = p.x.size[1];
    const int64_t sums = tiles_of(width, kBlockTile) * kDecodeBlockMaxRows;
    int64_t widest = 0, widest_mixed = 0;
    for (int64_t i = 0; i < p.count; ++i) {
      widest = std::max(widest, p.blocks[i].fc2.size[1]);
      if (i > 0) widest_mixed = std::max(widest_mixed, p.blocks[i].out_weight.size[1]);
    }
    normed = workspace.take<BlockElement>(rows * width);
    activations = workspace.take<BlockElement>(rows * widest);
    next = workspace.take<BlockElement>(rows * width);
    mixed = workspace.take<BlockElement>(rows * widest_mixed);
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

BlockConvolution convolution(const DecodeBlockWeights& block, const TensorView& indices) {
  BlockConvolution conv{};
  conv.weight = pointer<const BlockElement>(block.conv_weight);
  conv.state = pointer<BlockElement>(block.conv_state);
  conv.weight_stride = block.conv_weight.stride[0];
  conv.state_stride = block.conv_state.stride[0];
  conv.slots = block.conv_state.size[0], conv.indices = index_vector(indices);
  conv.taps = static_cast<int>(block.conv_weight.size[1]);
  return conv;
}

// The four stages of block i.
cudaError_t set_block(BlockArgs& args, const DecodeBlockParams& p, int i, const Between& between,
                      int clusters, int box_rows) {
  const DecodeBlockWeights& block = p.blocks[i];
  const bool first = i == 0, last = i + 1 == p.count, convolves = block.conv_weight.rank >= 0;
  const int64_t rows = p.x.size[0], width = p.x.size[1];
  const auto bf16 = [rows](BlockElement* data, int64_t columns) {
    return contiguous_view(data, DType::kBFloat16, rows, columns);
  };
  const TensorView mixed = first ? p.mixed : bf16(between.mixed, block.out_weight.size[1]);
  const TensorView normed = bf16(between.normed, width), next = bf16(between.next, width);
  const TensorView activations = bf16(between.activations, block.fc2.size[1]);
  const TensorView out = last ? p.out : bf16(between.mixed, block.conv_weight.size[0]);

  BlockStage* const stages = args.stages + i * kBlockStages;
  BlockStage &attend = stages[0], &up = stages[1], &down = stages[2], &project = stages[3];
  if (convolves) args.convolutions[i] = convolution(block, p.state_indices);
  cudaError_t error =
      product(attend, mixed, block.out_weight, normed, BlockEnding::kLinear, clusters, box_rows);
  add_to_residual(attend, first ? p.x : p.x_out, p.x_out, block.norm, between.squares);
  attend.bias = pointer<const BlockElement>(block.out_bias);
  if (error == cudaSuccess)
    error = product(up, normed, block.fc1, activations, BlockEnding::kSwiglu, clusters, box_rows);
  up.squares = between.squares, up.square_tiles = attend.tiles;
  if (error == cudaSuccess)
    error = product(down, activations, block.fc2, next, BlockEnding::kLinear, clusters, box_rows);
  add_to_residual(down, p.x_out, p.x_out, block.next_norm, between.next_squares);
  const BlockEnding ending = convolves ? BlockEnding::kConvolution : BlockEnding::kLinear;
  if (error == cudaSuccess)
    error = product(project, next, block.next_weight, out, ending, clusters, box_rows);
  project.squares = between.next_squares, project.square_tiles = down.tiles;
  project.bias = pointer<const BlockElement>(block.next_bias);
  return error;
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
                       p.op(), kBytes, kBlockCluster);
  }
  BlockArgs args{};
  args.rows = static_cast<int>(p.x.size[0]), args.width = static_cast<int>(p.x.size[1]);
  args.eps = static_cast<float>(p.eps);
  args.counter = pointer<unsigned>(p.counters);
  args.stage_count = static_cast<int>(p.count) * kBlockStages;
  const int ctas = clusters * kBlockCluster;
  unsigned finished = 0;
  for (int s = 0; s < args.stage_count; ++s) {
    const int block = s / kBlockStages;
    if (s % kBlockStages == 0) {
      const cudaError_t error = set_block(args, p, block, between, clusters, kRows);
      if (error != cudaSuccess) {
        return make_status(StatusCode::kCudaError, "%s: tensor map: expected success, got %s",
                           p.op(), cudaGetErrorString(error));
      }
    }
    BlockStage& stage = args.stages[s];
    const bool in_one_pass = stage.norm != nullptr || stage.ending == BlockEnding::kConvolution;
    if (in_one_pass && stage.tiles > ctas) {
      const TensorView& weight = *weights_of(p.blocks[block])[s % kBlockStages];
      return make_status(StatusCode::kUnsupported, "%s: %s: expected at most %d rows, got %lld",
                         p.op(), kWeights[s % kBlockStages], ctas * kBlockTile,
                         static_cast<long long>(weight.size[0]));
    }
    const int whole = stage.passes * ctas;
    stage.before = finished;
    finished += whole + (stage.tiles - whole) * stage.splits;
  }
  args.last = finished - 1;
  launch_clusters<BlockArgs>(kernel, clusters, kBlockCluster, kBlockThreads, kBytes, true,
                             static_cast<cudaStream_t>(stream), args);
  return launch_status(p.op());
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
        p.op());
  }
  for (int64_t s = 0; s < p.count * kBlockStages; ++s) {
    const TensorView& weight = *weights_of(p.blocks[s / kBlockStages])[s % kBlockStages];
    const int64_t most = std::max(weight.size[0], weight.size[1]);
    if (most > 1 << 24) {
      return make_status(StatusCode::kUnsupported,
                         "%s: %s: expected at most 2^24 rows and columns, got %lld", p.op(),
                         kWeights[s % kBlockStages], static_cast<long long>(most));
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
