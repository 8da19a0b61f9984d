// Checks of index values and the making of messages.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <new>

#include "checker.h"

namespace based {
namespace {

Status check_cu_seqlens(const char* op, const TensorView& cu_seqlens, int64_t total) {
  if (!given(cu_seqlens)) return {};
  const int64_t n = cu_seqlens.size[0] - 1;
  const auto bad = [&](const char* expected, int64_t i, int64_t got) {
    return make_status(StatusCode::kInvalidArgument,
                       "%s: cu_seqlens: expected %s, got %lld at index %lld", op, expected,
                       static_cast<long long>(got), static_cast<long long>(i));
  };
  if (load_index(cu_seqlens, 0) != 0)
    return bad("a first entry of 0", 0, load_index(cu_seqlens, 0));
  for (int64_t i = 1; i <= n; ++i) {
    if (load_index(cu_seqlens, i) < load_index(cu_seqlens, i - 1)) {
      return bad("non-decreasing entries", i, load_index(cu_seqlens, i));
    }
  }
  if (load_index(cu_seqlens, n) != total) {
    char expected[64];
    std::snprintf(expected, sizeof expected, "a last entry of T = %lld",
                  static_cast<long long>(total));
    return bad(expected, n, load_index(cu_seqlens, n));
  }
  return {};
}

// Entries in [0, end), where end < 0 stands for no end.
Status check_counts(const char* op, const char* argument, const TensorView& counts,
                    int64_t end = -1) {
  for (int64_t i = 0; given(counts) && i < counts.size[0]; ++i) {
    const int64_t count = load_index(counts, i);
    if (count >= 0 && (end < 0 || count < end)) continue;
    char expected[64] = "entries >= 0";
    if (end >= 0) {
      std::snprintf(expected, sizeof expected, "entries in [0, C = %lld)",
                    static_cast<long long>(end));
    }
    return make_status(StatusCode::kInvalidArgument, "%s: %s: expected %s, got %lld at index %lld",
                       op, argument, expected, static_cast<long long>(count),
                       static_cast<long long>(i));
  }
  return {};
}

Status check_slots(const char* op, const TensorView& indices, int64_t slots) {
  if (!given(indices)) return {};
  std::unique_ptr<bool[]> taken(new (std::nothrow) bool[slots]());
  if (!taken) return make_status(StatusCode::kOutOfMemory, "%s: out of memory", op);
  for (int64_t i = 0; i < indices.size[0]; ++i) {
    const int64_t slot = load_index(indices, i);
    const auto bad = [&](const char* expected) {
      return make_status(StatusCode::kInvalidArgument,
                         "%s: state_indices: expected %s (slots = %lld), got %lld at index %lld",
                         op, expected, static_cast<long long>(slots), static_cast<long long>(slot),
                         static_cast<long long>(i));
    };
    if (slot < -1 || slot >= slots) return bad("entries in [-1, slots)");
    if (slot >= 0 && taken[slot]) return bad("every slot at most once");
    if (slot >= 0) taken[slot] = true;
  }
  return {};
}

// The first of two outcomes that is a failure.
Status first_failure(const Status& a, const Status& b) { return a.ok() ? b : a; }

}  // namespace

Status validate_indices(const TaylorFeatureMapParams&) { return {}; }
Status validate_indices(const SkinnyLinearParams&) { return {}; }

Status validate_indices(const DecodeBlockParams& p) {
  int64_t slots = INT64_MAX;  // that every convolution has
  for (int64_t i = 0; i < p.count; ++i) {
    if (p.blocks[i].conv_state.rank >= 0) slots = std::min(slots, p.blocks[i].conv_state.size[0]);
  }
  return check_slots(p.op(), p.state_indices, slots);
}

Status validate_indices(const LinearAttentionParams& p) {
  return check_cu_seqlens("linear_attention", p.cu_seqlens, p.q.size[1]);
}

Status validate_indices(const LinearAttentionBackwardParams& p) {
  return check_cu_seqlens("linear_attention_backward", p.cu_seqlens, p.q.size[1]);
}

Status validate_indices(const LinearAttentionDecodeParams& p) {
  return check_slots("linear_attention_decode", p.state_indices, p.kv_state.size[0]);
}

Status validate_indices(const LinearAttentionDecodeDeferredParams& p) {
  const char* op = "linear_attention_decode_deferred";
  return first_failure(check_slots(op, p.state_indices, p.kv_state.size[0]),
                       check_counts(op, "fill", p.fill, p.pending_k.size[1]));
}

Status validate_indices(const LinearAttentionFoldParams& p) {
  const char* op = "linear_attention_fold";
  return first_failure(check_slots(op, p.state_indices, p.kv_state.size[0]),
                       check_counts(op, "fill", p.fill, p.pending_k.size[1]));
}

Status validate_indices(const SlidingWindowParams& p) {
  const char* op = "sliding_window_attention";
  return first_failure(check_cu_seqlens(op, p.cu_seqlens, p.q.size[1]),
                       check_counts(op, "initial_positions", p.initial_positions));
}

Status validate_indices(const SlidingWindowBackwardParams& p) {
  const char* op = "sliding_window_attention_backward";
  return first_failure(check_cu_seqlens(op, p.cu_seqlens, p.q.size[1]),
                       check_counts(op, "initial_positions", p.initial_positions));
}

Status validate_indices(const SlidingWindowDecodeParams& p) {
  const char* op = "sliding_window_decode";
  return first_failure(check_slots(op, p.state_indices, p.k_cache.size[0]),
                       check_counts(op, "positions", p.positions));
}

Status validate_indices(const ShortConvParams& p) {
  return check_cu_seqlens("short_conv", p.cu_seqlens, p.x.size[1]);
}

Status validate_indices(const ShortConvBackwardParams& p) {
  return check_cu_seqlens("short_conv_backward", p.cu_seqlens, p.x.size[1]);
}

Status validate_indices(const ShortConvDecodeParams& p) {
  return check_slots("short_conv_decode", p.state_indices, p.conv_state.size[0]);
}

Status make_status(StatusCode code, const char* format, ...) {
  Status status;
  status.code = code;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(status.message, sizeof status.message, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace based
