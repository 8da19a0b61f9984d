// Arguments of the matrix products of a decode step.
#include "checker.h"

namespace based {
namespace {

// Matrices of 2-byte elements that the copy engine reads.
void check_aligned_rows(Checker& check, const char* argument, const TensorView& view) {
  const bool several = view.size[0] > 1;
  const bool strided = several && (view.stride[0] < view.size[1] || view.stride[0] % 8 != 0);
  if (strided || reinterpret_cast<uintptr_t>(view.data) % 16 != 0) {
    check.fail(argument, "rows that start at multiples of 16 bytes and do not overlap", "others");
  }
}

// The convolution of rows of `columns` products, all of its tensors or none.
void check_convolution(Checker& check, const DecodeBlockWeights& p, const TensorView& indices,
                       int64_t rows, int64_t columns) {
  if (!given(p.conv_weight)) {
    if (given(p.conv_state)) check.fail("conv_weight", "(C, taps) with conv_state", "no tensor");
    return;
  }
  check.require(columns % 16 == 0, "next_weight", "M = 2 C with conv_weight, C a multiple of 8",
                double(columns));
  const int64_t channels = columns / 2;
  check.same("conv_weight", p.conv_weight, "(C, taps)", {channels, kAny});
  if (!check.ok()) return;
  const int64_t taps = p.conv_weight.size[1];
  check.require(taps >= 2 && taps <= kDecodeBlockMaxTaps, "conv_weight", "2..4 taps", double(taps));
  check.same("conv_state", p.conv_state, "(slots, C, taps-1)",
             {given(indices) ? kAny : rows, channels, taps - 1});
  check.require(p.conv_state.stride[1] == taps - 1, "conv_state", "contiguous slots: stride taps-1",
                double(p.conv_state.stride[1]));
  TensorView slots = p.conv_state;  // as the copy engine takes them: whole
  slots.size[1] *= slots.size[2];
  check_aligned_rows(check, "conv_state", slots);
}

// Block i, whose mixed is (rows, width).
void check_block(Checker& check, const DecodeBlockParams& p, int64_t i, int64_t width) {
  const DecodeBlockWeights& block = p.blocks[i];
  // A size that its tensor does not have is 0 here; the check of the shape says so.
  const int64_t rows = p.x.size[0], d = p.x.size[1], m = block.fc1.size[0] / 2;
  const int64_t columns = block.next_weight.size[0];
  check.same("out_weight", block.out_weight, "(d, K)", {d, width});
  if (given(block.out_bias)) check.same("out_bias", block.out_bias, "(d,)", {d});
  check.same("norm_weight", block.norm, "(d,)", {d});
  check.same("fc1", block.fc1, "(2m, d)", {2 * m, d});
  check.require(m >= 8 && m % 8 == 0, "fc1", "m a multiple of 8, at least 8", double(m));
  check.same("fc2", block.fc2, "(d, m)", {d, m});
  check.same("next_norm_weight", block.next_norm, "(d,)", {d});
  check.same("next_weight", block.next_weight, "(M, d)", {columns, d});
  check.require(columns >= 1, "next_weight", "M >= 1", double(columns));
  if (given(block.next_bias)) check.same("next_bias", block.next_bias, "(M,)", {columns});
  check_aligned_rows(check, "out_weight", block.out_weight);
  check_aligned_rows(check, "fc1", block.fc1);
  check_aligned_rows(check, "fc2", block.fc2);
  check_aligned_rows(check, "next_weight", block.next_weight);
  check_convolution(check, block, p.state_indices, rows, columns);
}

}  // namespace

Status validate(const SkinnyLinearParams& p) {
  Checker check("skinny_linear", p.x, "x");
  check.first("(N, K)", {kAny, kAny});
  if (!check.ok()) return check.status();
  const DType dtype = p.x.dtype;
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat16) {
    check.fail("x", "bfloat16 or float16", name(dtype));
  }
  if (p.x.device.type != DeviceType::kCuda) {
    check.fail("x", "a tensor on a GPU", device_text(p.x.device).chars);
  }
  const int64_t rows = p.x.size[0], width = p.x.size[1];
  check.require(rows <= kSkinnyMaxRows, "x", "at most 64 rows", double(rows));
  check.require(width >= 1, "x", "K >= 1", double(width));
  check.same("weight", p.weight, "(M, K)", {kAny, width});
  if (!check.ok()) return check.status();
  const int64_t columns = p.weight.size[0];
  check_aligned_rows(check, "x", p.x);
  check_aligned_rows(check, "weight", p.weight);
  if (p.swiglu) {
    check.require(columns % 2 == 0, "weight", "an even M with swiglu", double(columns));
    check.require(!given(p.bias), "bias", "none with swiglu", 1);
  }
  if (given(p.bias)) check.same("bias", p.bias, "(M,)", {columns});
  check.same("out", p.out, "(N, M) or (N, M/2)", {rows, p.swiglu ? columns / 2 : columns});
  return check.status();
}

Status validate(const DecodeBlockParams& p) {
  Checker check(p.op(), p.mixed, "mixed");
  check.first("(N, K)", {kAny, kAny});
  if (!check.ok()) return check.status();
  if (p.mixed.dtype != DType::kBFloat16) check.fail("mixed", "bfloat16", name(p.mixed.dtype));
  const int64_t rows = p.mixed.size[0];
  check.require(rows <= kDecodeBlockMaxRows, "mixed", "at most 128 rows", double(rows));
  check.require(p.mixed.size[1] >= 1, "mixed", "K >= 1", double(p.mixed.size[1]));
  check_aligned_rows(check, "mixed", p.mixed);
  check.wide("x", p.x, "(N, d)", {rows, kAny});
  if (!check.ok()) return check.status();
  const int64_t d = p.x.size[1];
  check.require(d >= 8 && d % 8 == 0, "x", "d a multiple of 8, at least 8", double(d));
  check.require(rows <= 1 || p.x.stride[0] >= d, "x", "rows that do not overlap",
                double(p.x.stride[0]));
  check.require(p.count >= 1 && p.count <= kDecodeMaxBlocks, "blocks", "1 to 6 blocks",
                double(p.count));
  if (!check.ok()) return check.status();
  int64_t width = p.mixed.size[1];
  bool convolves = false;
  for (int64_t i = 0; i < p.count; ++i) {
    const DecodeBlockWeights& block = p.blocks[i];
    if (p.count > 1) check.within("blocks", i);
    check_block(check, p, i, width);
    if (i + 1 < p.count && !given(block.conv_weight)) {
      check.fail("conv_weight", "(C, taps) for every block but the last", "no tensor");
    }
    if (!check.ok()) return check.status();
    convolves = convolves || given(block.conv_weight);
    width = given(block.conv_weight) ? block.conv_weight.size[0] : block.next_weight.size[0];
  }
  check.within_none();
  if (given(p.state_indices)) {
    if (!convolves) check.fail("conv_weight", "(C, taps) with state_indices", "no tensor");
    check.index("state_indices", p.state_indices, "(N,)", {rows});
  }
  check.index("counters", p.counters, "(8,)", {kDecodeBlockCounters});
  if (p.counters.dtype != DType::kInt32) check.fail("counters", "int32", name(p.counters.dtype));
  check.require(p.eps >= 0, "eps", "a number >= 0", p.eps);
  check.wide("x_out", p.x_out, "(N, d)", {rows, d});
  check.same("out", p.out, "(N, M) or (N, C)", {rows, width});
  if (p.mixed.device.type != DeviceType::kCuda) {
    check.fail("mixed", "a tensor on a GPU", device_text(p.mixed.device).chars);
  }
  return check.status();
}

}  // namespace based
