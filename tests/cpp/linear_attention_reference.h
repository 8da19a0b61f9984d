// A random linear-attention problem, and its answer by the quadratic definition in double.
#pragma once

#include "taylor_reference.h"

namespace based::testing::linear_attention {

struct Case {
  int64_t batch, seqlen, heads, feature_dim, head_dim;
  DType dtype = DType::kFloat32;
  Layout layout = Layout::kContiguous;
  bool normalize = true, state = true;
  std::vector<int64_t> cu_seqlens = {};  // packed when not empty
  double mean = 0, scale = 0.3;

  int64_t sequences() const { return cu_seqlens.empty() ? batch : int64_t(cu_seqlens.size()) - 1; }
  // Its first token, counted over all batch rows, and its length.
  int64_t begin(int64_t n) const { return cu_seqlens.empty() ? n * seqlen : cu_seqlens[n]; }
  int64_t length(int64_t n) const { return begin(n + 1) - begin(n); }
  int64_t expanded() const { return expanded_dim(feature_dim); }

  std::string text() const {
    return "B" + std::to_string(batch) + " T" + std::to_string(seqlen) + " H" +
           std::to_string(heads) + " D" + std::to_string(feature_dim) + " V" +
           std::to_string(head_dim) + " " + name(dtype) + (normalize ? " normalize" : "") +
           (state ? " state" : "") + (cu_seqlens.empty() ? "" : " packed") +
           (layout == Layout::kStrided ? " strided" : "");
  }
};

// Inputs, outputs and gradients of a case. What the case leaves out is not given.
struct Problem {
  Case c;
  Tensor q, k, v, kv, z, cu_seqlens, dout, dfinal_kv, dfinal_z;
  Tensor out, final_kv, final_z, dq, dk, dv, dkv, dz;

  explicit Problem(const Case& chosen) : c(chosen) {
    std::mt19937 random(c.batch + 2 * c.seqlen + 3 * c.feature_dim + 5 * c.head_dim);
    const int64_t N = c.sequences(), F = c.expanded();
    const std::vector<int64_t> narrow = {c.batch, c.seqlen, c.heads, c.feature_dim};
    const std::vector<int64_t> wide = {c.batch, c.seqlen, c.heads, c.head_dim};
    const std::vector<int64_t> kv_sizes = {N, c.heads, F, c.head_dim}, z_sizes = {N, c.heads, F};
    const auto input = [&](const std::vector<int64_t>& sizes, double mean = 0) {
      return random_tensor(random, c.dtype, sizes, c.layout, mean);
    };
    const auto output = [&](const std::vector<int64_t>& sizes) {
      return Tensor(c.dtype, sizes, c.layout);
    };
    const DType state_dtype = accumulator(c.dtype);
    q = input(narrow), k = input(narrow), v = input(wide, c.mean), dout = input(wide);
    out = output(wide), dq = output(narrow), dk = output(narrow), dv = output(wide);
    if (!c.cu_seqlens.empty()) cu_seqlens = index_tensor(DType::kInt64, c.cu_seqlens);
    if (!c.state) return;
    kv = random_tensor(random, state_dtype, kv_sizes, c.layout);
    z = random_tensor(random, state_dtype, z_sizes, c.layout, 0, 0.1);
    for (int64_t i = 0; i < N * c.heads; ++i) z.set(i * F, 20);  // the denominator stays positive
    dfinal_kv = random_tensor(random, state_dtype, kv_sizes, c.layout);
    dfinal_z = random_tensor(random, state_dtype, z_sizes, c.layout);
    final_kv = dkv = Tensor(state_dtype, kv_sizes, c.layout);
    final_z = dz = Tensor(state_dtype, z_sizes, c.layout);
  }

  LinearAttentionBackwardParams params() const {
    LinearAttentionBackwardParams p;
    p.q = q.view, p.k = k.view, p.v = v.view, p.cu_seqlens = cu_seqlens.view, p.out = out.view;
    p.initial_kv_state = kv.view, p.initial_k_state = z.view;
    p.final_kv_state = final_kv.view, p.final_k_state = final_z.view;
    p.scale = c.scale, p.normalize = c.normalize;
    p.dout = dout.view, p.dfinal_kv_state = dfinal_kv.view, p.dfinal_k_state = dfinal_z.view;
    p.dq = dq.view, p.dk = dk.view, p.dv = dv.view;
    p.dinitial_kv_state = dkv.view, p.dinitial_k_state = dz.view;
    return p;
  }
};

struct Expected {
  Values out, final_kv, final_z, dq, dk, dv, dkv, dz;
};

// Forward and gradients of <out, dout> + <final states, dfinal states>. A token reads the initial
// state S, z like one more key: num += phi(q) S, den += phi(q) z.
inline Expected reference(const Problem& problem) {
  const Case& c = problem.c;
  const int64_t D = c.feature_dim, V = c.head_dim, F = c.expanded(), H = c.heads;
  const Values q = problem.q.values(), k = problem.k.values(), v = problem.v.values();
  const Values dout = problem.dout.values(), zeros(c.sequences() * H * F * V);
  const Values kv = c.state ? problem.kv.values() : zeros, z = c.state ? problem.z.values() : zeros;
  const Values dlast_kv = c.state ? problem.dfinal_kv.values() : zeros;
  const Values dlast_z = c.state ? problem.dfinal_z.values() : zeros;
  Expected e;
  e.out = e.dv = Values(v.size()), e.dq = e.dk = Values(q.size());
  e.final_kv = kv, e.final_z = z, e.dkv = dlast_kv, e.dz = dlast_z;

  const auto one_head = [&](int64_t n, int64_t h) {
    const double *S = &kv[(n * H + h) * F * V], *s = &z[(n * H + h) * F];
    const double *dS = &dlast_kv[(n * H + h) * F * V], *ds = &dlast_z[(n * H + h) * F];
    double *final_S = &e.final_kv[(n * H + h) * F * V], *final_s = &e.final_z[(n * H + h) * F];
    double *dinitial_S = &e.dkv[(n * H + h) * F * V], *dinitial_s = &e.dz[(n * H + h) * F];
    for (int64_t t = c.begin(n); t < c.begin(n + 1); ++t) {
      const int64_t at = t * H + h;
      const Values phi_q = taylor_map(&q[at * D], D, c.scale);
      const auto score = [&](int64_t i) {
        double dot = 0;
        for (int64_t d = 0; d < D; ++d) dot += q[at * D + d] * k[(i * H + h) * D + d];
        return c.scale * dot;
      };
      Values num(V), dnum(V), dphi_q(F);
      double den = 0, dden = 0;
      for (int64_t f = 0; f < F; ++f) {
        den += phi_q[f] * s[f];
        for (int64_t i = 0; i < V; ++i) num[i] += phi_q[f] * S[f * V + i];
      }
      for (int64_t u = c.begin(n); u <= t; ++u) {
        const double w = 1 + score(u) + score(u) * score(u) / 2;
        den += w;
        for (int64_t i = 0; i < V; ++i) num[i] += w * v[(u * H + h) * V + i];
      }
      if (!c.normalize) den = 1;
      for (int64_t i = 0; i < V; ++i) {
        e.out[at * V + i] = num[i] / den;
        dnum[i] = dout[at * V + i] / den;
        if (c.normalize) dden -= dnum[i] * num[i] / den;
      }
      for (int64_t f = 0; f < F; ++f) {
        dphi_q[f] = dden * s[f];
        dinitial_s[f] += dden * phi_q[f];
        for (int64_t i = 0; i < V; ++i) {
          dphi_q[f] += dnum[i] * S[f * V + i];
          dinitial_S[f * V + i] += phi_q[f] * dnum[i];
        }
      }
      add_taylor_gradient(&q[at * D], D, c.scale, dphi_q.data(), &e.dq[at * D]);
      for (int64_t u = c.begin(n); u <= t; ++u) {
        const int64_t key = u * H + h;
        const double x = score(u), w = 1 + x + x * x / 2;
        double dw = dden;
        for (int64_t i = 0; i < V; ++i) {
          dw += dnum[i] * v[key * V + i];
          e.dv[key * V + i] += w * dnum[i];
        }
        for (int64_t d = 0; d < D; ++d) {
          e.dq[at * D + d] += dw * (1 + x) * c.scale * k[key * D + d];
          e.dk[key * D + d] += dw * (1 + x) * c.scale * q[at * D + d];
        }
      }
      // The token as a key: what it adds to the final state.
      const Values phi_k = taylor_map(&k[at * D], D, c.scale);
      Values dphi_k(ds, ds + F);
      for (int64_t f = 0; f < F; ++f) {
        final_s[f] += phi_k[f];
        for (int64_t i = 0; i < V; ++i) {
          final_S[f * V + i] += phi_k[f] * v[at * V + i];
          dphi_k[f] += dS[f * V + i] * v[at * V + i];
          e.dv[at * V + i] += phi_k[f] * dS[f * V + i];
        }
      }
      add_taylor_gradient(&k[at * D], D, c.scale, dphi_k.data(), &e.dk[at * D]);
    }
  };
  for (int64_t n = 0; n < c.sequences(); ++n) {
    for (int64_t h = 0; h < H; ++h) one_head(n, h);
  }
  return e;
}

}  // namespace based::testing::linear_attention
