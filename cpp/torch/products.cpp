// The matrix products of a decode step as torch ops, in the manner of ops.cpp.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "run.h"

namespace based::binding {
namespace {

// ---- skinny_linear -----------------------------------------------------------------------------

Tensor skinny_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     bool swiglu) {
  const int64_t columns = size_of(weight, 0);
  const Tensor out = empty(x, {size_of(x, 0), swiglu ? columns / 2 : columns}, x.scalar_type());
  SkinnyLinearParams p;
  p.x = view(x), p.weight = view(weight), p.bias = view(bias), p.out = view(out);
  p.swiglu = swiglu;
  // There is no kernel for the CPU; the check says so.
  run<SkinnyLinearParams>("skinny_linear", x, p,
                          [](const SkinnyLinearParams& p, ParallelFor) { return validate(p); });
  return out;
}

// ---- decode_block ------------------------------------------------------------------------------

// The op itself: p has the blocks, the counters, the indices and eps.
std::tuple<Tensor, Tensor> run_blocks(DecodeBlockParams& p, const Tensor& mixed, const Tensor& x,
                                      int64_t columns) {
  const Tensor x_out = fresh_like(x);
  const Tensor out = empty(mixed, {size_of(x, 0), columns}, mixed.scalar_type());
  p.mixed = view(mixed), p.x = view(x), p.x_out = view(x_out), p.out = view(out);
  // As with skinny_linear, the check says that there is no kernel for the CPU.
  run<DecodeBlockParams>(p.op(), mixed, p,
                         [](const DecodeBlockParams& p, ParallelFor) { return validate(p); });
  return {x_out, out};
}

std::tuple<Tensor, Tensor> decode_block(const Tensor& mixed, const Tensor& x,
                                        const Tensor& out_weight, const OptionalTensor& out_bias,
                                        const Tensor& norm, const Tensor& fc1, const Tensor& fc2,
                                        const Tensor& next_norm, const Tensor& next_weight,
                                        const OptionalTensor& next_bias, Tensor counters,
                                        const OptionalTensor& conv_weight,
                                        OptionalTensor conv_state,
                                        const OptionalTensor& state_indices, double eps) {
  DecodeBlockParams p;
  DecodeBlockWeights& block = p.blocks[0];
  block.out_weight = view(out_weight), block.out_bias = view(out_bias), block.norm = view(norm);
  block.fc1 = view(fc1), block.fc2 = view(fc2), block.next_norm = view(next_norm);
  block.next_weight = view(next_weight), block.next_bias = view(next_bias);
  block.conv_weight = view(conv_weight), block.conv_state = view(conv_state);
  p.counters = view(counters), p.state_indices = view(state_indices), p.eps = eps;
  return run_blocks(p, mixed, x, size_of(next_weight, 0) / (conv_weight.has_value() ? 2 : 1));
}

std::tuple<Tensor, Tensor> decode_blocks(const Tensor& mixed, const Tensor& x,
                                         const std::vector<Tensor>& weights,
                                         const std::vector<OptionalTensor>& biases, Tensor counters,
                                         const std::vector<Tensor>& conv_weights,
                                         std::vector<Tensor> conv_states,
                                         const OptionalTensor& state_indices, double eps) {
  const size_t count = weights.size() / 6, convolutions = conv_weights.size();
  const auto require = [](bool condition, const char* argument, const char* expected, size_t got) {
    if (condition) return;
    raise_unless_ok(make_status(StatusCode::kInvalidArgument,
                                "decode_blocks: %s: expected %s, got %zu", argument, expected,
                                got));
  };
  require(count >= 1 && count <= kDecodeMaxBlocks, "blocks", "1 to 6 of them", count);
  require(weights.size() == 6 * count, "weights", "6 tensors a block", weights.size());
  require(biases.size() == 2 * count, "biases", "2 a block", biases.size());
  require(convolutions == count || convolutions + 1 == count, "conv_weights",
          "one a block, or one less", convolutions);
  require(conv_states.size() == convolutions, "conv_states", "as many as conv_weights",
          conv_states.size());
  DecodeBlockParams p;
  p.count = static_cast<int64_t>(count);
  for (size_t i = 0; i < count; ++i) {
    DecodeBlockWeights& block = p.blocks[i];
    const Tensor* const w = &weights[6 * i];
    block.out_weight = view(w[0]), block.norm = view(w[1]), block.fc1 = view(w[2]);
    block.fc2 = view(w[3]), block.next_norm = view(w[4]), block.next_weight = view(w[5]);
    block.out_bias = view(biases[2 * i]), block.next_bias = view(biases[2 * i + 1]);
    if (i < convolutions) {
      block.conv_weight = view(conv_weights[i]), block.conv_state = view(conv_states[i]);
    }
  }
  p.counters = view(counters), p.state_indices = view(state_indices), p.eps = eps;
  const int64_t columns = size_of(weights.back(), 0);
  return run_blocks(p, mixed, x, convolutions == count ? columns / 2 : columns);
}

// The same functions serve both keys: run() follows the tensors.
void register_products(torch::stable::detail::StableLibrary& m) {
  m.impl("skinny_linear", TORCH_BOX(&skinny_linear));
  m.impl("decode_block", TORCH_BOX(&decode_block));
  m.impl("decode_blocks", TORCH_BOX(&decode_blocks));
}

}  // namespace
}  // namespace based::binding

STABLE_TORCH_LIBRARY_IMPL(based_ops, CPU, m) { based::binding::register_products(m); }

STABLE_TORCH_LIBRARY_IMPL(based_ops, CUDA, m) { based::binding::register_products(m); }
