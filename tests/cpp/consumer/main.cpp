// A program outside the project: v = 1 must come out of linear attention as 1, and a bad argument
// as a named error.
#include <based/ops.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

int main() {
  const int64_t T = 100, H = 3, D = 16, V = 20;
  std::vector<float> q(T * H * D), k(T * H * D), v(T * H * V, 1.0f), out(T * H * V, NAN);
  for (size_t i = 0; i < q.size(); ++i) {
    q[i] = std::sin(0.7f * i);
    k[i] = std::cos(1.3f * i);
  }
  based::LinearAttentionParams params;
  params.q = based::contiguous_view(q.data(), based::DType::kFloat32, 1, T, H, D);
  params.k = based::contiguous_view(k.data(), based::DType::kFloat32, 1, T, H, D);
  params.v = based::contiguous_view(v.data(), based::DType::kFloat32, 1, T, H, V);
  params.out = based::contiguous_view(out.data(), based::DType::kFloat32, 1, T, H, V);
  params.scale = 0.25;
  based::Status status = based::cpu::linear_attention(params);
  if (!status.ok()) return std::printf("%s\n", status.message), 1;
  for (float x : out) {
    if (!(std::fabs(x - 1.0f) < 1e-5f)) return std::printf("expected 1, got %g\n", x), 1;
  }
  params.k.size[3] = 8;
  status = based::cpu::linear_attention(params);
  std::printf("%s: %s\n", based::cpu::instruction_set(), status.message);
  return std::strstr(status.message, "linear_attention: k: expected shape") == nullptr;
}
