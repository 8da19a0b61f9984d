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
template <class Params>
Status run(const char* op, bool (*kernel)(const Params&, ParallelFor), const Params& params,
           ParallelFor parallel) {
  Status status = validate(params);
  if (status.ok()) status = validate_indices(params);
  if (!status.ok()) return status;
  if (parallel.run == nullptr) parallel.run = run_with_threads;
  if (!kernel(params, parallel)) {
    return make_status(StatusCode::kOutOfMemory, "%s: out of memory for scratch buffers", op);
  }
  return status;
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
  return run("linear_attention", kernels().linear_attention, p, parallel);
}

Status linear_attention_backward(const LinearAttentionBackwardParams& p, ParallelFor parallel) {
  return run("linear_attention_backward", kernels().linear_attention_backward, p, parallel);
}

Status linear_attention_decode(const LinearAttentionDecodeParams& p, ParallelFor parallel) {
  return run("linear_attention_decode", kernels().linear_attention_decode, p, parallel);
}

Status linear_attention_decode_deferred(const LinearAttentionDecodeDeferredParams& p,
                                        ParallelFor parallel) {
  return run("linear_attention_decode_deferred", kernels().linear_attention_decode_deferred, p,
             parallel);
}

Status linear_attention_fold(const LinearAttentionFoldParams& p, ParallelFor parallel) {
  return run("linear_attention_fold", kernels().linear_attention_fold, p, parallel);
}

Status sliding_window_attention(const SlidingWindowParams& p, ParallelFor parallel) {
  return run("sliding_window_attention", kernels().sliding_window_attention, p, parallel);
}

Status sliding_window_attention_backward(const SlidingWindowBackwardParams& p,
                                         ParallelFor parallel) {
  return run("sliding_window_attention_backward", kernels().sliding_window_attention_backward, p,
             parallel);
}

Status sliding_window_decode(const SlidingWindowDecodeParams& p, ParallelFor parallel) {
  return run("sliding_window_decode", kernels().sliding_window_decode, p, parallel);
}

Status short_conv(const ShortConvParams& p, ParallelFor parallel) {
  return run("short_conv", kernels().short_conv, p, parallel);
}

Status short_conv_backward(const ShortConvBackwardParams& p, ParallelFor parallel) {
  return run("short_conv_backward", kernels().short_conv_backward, p, parallel);
}

Status short_conv_decode(const ShortConvDecodeParams& p, ParallelFor parallel) {
  return run("short_conv_decode", kernels().short_conv_decode, p, parallel);
}

}  // namespace based::cpu
