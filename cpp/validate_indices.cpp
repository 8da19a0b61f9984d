// Checks of index values and the making of messages.
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <new>

#include "checker.h"

namespace based {

Status validate_cu_seqlens(const char* op, const TensorView& cu_seqlens, int64_t total) {
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

Status validate_positions(const char* op, const char* argument, const TensorView& positions) {
  for (int64_t i = 0; given(positions) && i < positions.size[0]; ++i) {
    if (load_index(positions, i) < 0) {
      return make_status(
          StatusCode::kInvalidArgument, "%s: %s: expected entries >= 0, got %lld at index %lld", op,
          argument, static_cast<long long>(load_index(positions, i)), static_cast<long long>(i));
    }
  }
  return {};
}

Status validate_state_indices(const char* op, const TensorView& indices, int64_t slots) {
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
