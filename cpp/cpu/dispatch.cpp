// The public CPU ops: check the arguments, then run the kernel of the best instruction set.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "based/ops.h"
#include "kernels.h"
#include "validate.h"

namespace based::cpu {
namespace {

const Kernels& best_kernels() {
#if defined(__x86_64__)
  const char* forced = std::getenv("BASED_CPU_ISA");
  const auto wants = [&](const char* name) { return !forced || std::strcmp(forced, name) == 0; };
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && wants("avx512")) return avx512::kKernels;
  if (has_avx2 && wants("avx2")) return avx2::kKernels;
#endif
  return generic::kKernels;
}

const Kernels& kernels() {
  static const Kernels& chosen = best_kernels();
  return chosen;
}

// The standalone parallel_for: equal ranges, one thread per hardware core. A thread that cannot be
// started leaves its range to the caller.
void run_with_threads(void*, int64_t count, ParallelFor::Body body, void* argument) {
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t ranges = std::min(cores, count);
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < ranges; ++i) {
    const int64_t begin = count * i / ranges, end = count * (i + 1) / ranges;
    try {
      threads.emplace_back(body, argument, begin, end);
    } catch (const std::system_error&) {
      body(argument, begin, end);
    }
  }
  body(argument, 0, count / ranges);
  for (std::thread& thread : threads) thread.join();
}

// Runs `kernel` once every check passed.
template <class Params, class... Checks>
Status run(const char* op, bool (*kernel)(const Params&, ParallelFor), const Params& params,
           ParallelFor parallel, const Checks&... checks) {
  Status status = validate(params);
  ((status.ok() ? void(status = checks()) : void()), ...);
  if (!status.ok()) return status;
  if (parallel.run == nullptr) parallel.run = run_with_threads;
  if (!kernel(params, parallel)) {
    return make_status(StatusCode::kOutOfMemory, "%s: out of memory for scratch buffers", op);
  }
  return status;
}

template <class Params>
auto cu_seqlens_check(const char* op, const Params& p, int64_t total) {
  return [op, &p, total] { return validate_cu_seqlens(op, p.cu_seqlens, total); };
}

template <class Params>
auto slots_check(const char* op, const Params& p, const TensorView& state) {
  return [op, &p, &state] { return validate_state_indices(op, p.state_indices, state.size[0]); };
}

auto positions_check(const char* op, const char* argument, const TensorView& positions) {
  return [op, argument, &positions] { return validate_positions(op, argument, positions); };
}

}  // namespace

const char* instruction_set() { return kernels().name; }

Status taylor_feature_map(const TaylorFeatureMapParams& p, ParallelFor parallel) {
  return run("taylor_feature_map", kernels().taylor_feature_map, p, parallel);
}

Status taylor_feature_map_backward(const TaylorFeatureMapBackwardParams& p, ParallelFor parallel) {
  return run("taylor_feature_map_backward", kernels().taylor_feature_map_backward, p, parallel);
}

Status linear_attention(const LinearAttentionParams& p, ParallelFor parallel) {
  const char* op = "linear_attention";
  return run(op, kernels().linear_attention, p, parallel, cu_seqlens_check(op, p, p.q.size[1]));
}

Status linear_attention_backward(const LinearAttentionBackwardParams& p, ParallelFor parallel) {
  const char* op = "linear_attention_backward";
  return run(op, kernels().linear_attention_backward, p, parallel,
             cu_seqlens_check(op, p, p.q.size[1]));
}

Status linear_attention_decode(const LinearAttentionDecodeParams& p, ParallelFor parallel) {
  const char* op = "linear_attention_decode";
  return run(op, kernels().linear_attention_decode, p, parallel, slots_check(op, p, p.kv_state));
}

Status sliding_window_attention(const SlidingWindowParams& p, ParallelFor parallel) {
  const char* op = "sliding_window_attention";
  return run(op, kernels().sliding_window_attention, p, parallel,
             cu_seqlens_check(op, p, p.q.size[1]),
             positions_check(op, "initial_positions", p.initial_positions));
}

Status sliding_window_attention_backward(const SlidingWindowBackwardParams& p,
                                         ParallelFor parallel) {
  const char* op = "sliding_window_attention_backward";
  return run(op, kernels().sliding_window_attention_backward, p, parallel,
             cu_seqlens_check(op, p, p.q.size[1]),
             positions_check(op, "initial_positions", p.initial_positions));
}

Status sliding_window_decode(const SlidingWindowDecodeParams& p, ParallelFor parallel) {
  const char* op = "sliding_window_decode";
  return run(op, kernels().sliding_window_decode, p, parallel, slots_check(op, p, p.k_cache),
             positions_check(op, "positions", p.positions));
}

Status short_conv(const ShortConvParams& p, ParallelFor parallel) {
  const char* op = "short_conv";
  return run(op, kernels().short_conv, p, parallel, cu_seqlens_check(op, p, p.x.size[1]));
}

Status short_conv_backward(const ShortConvBackwardParams& p, ParallelFor parallel) {
  const char* op = "short_conv_backward";
  return run(op, kernels().short_conv_backward, p, parallel, cu_seqlens_check(op, p, p.x.size[1]));
}

Status short_conv_decode(const ShortConvDecodeParams& p, ParallelFor parallel) {
  const char* op = "short_conv_decode";
  return run(op, kernels().short_conv_decode, p, parallel, slots_check(op, p, p.conv_state));
}

}  // namespace based::cpu
