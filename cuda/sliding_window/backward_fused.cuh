// The backward of 16-bit calls on Hopper, in one kernel that reads every row once (the formulas are
// in backward.cuh).
//
// A CTA walks along one head of a sequence in blocks of 64 rows. One of its warpgroups loads, k and
// v into one ring of slots, q, dout and lse into another. One takes block after block of queries
// and passes over their keys twice: for delta_t = sum_s p_ts <dout_t, v_s> / sum_s p_ts, then for
// dq; where registers allow, two warpgroups share this. One takes block after block of keys and
// computes dk and dv, as soon as the queries that see them have their delta. So out is not read,
// and its rounding does not matter.
//
// A CTA owns the queries and the keys of its rows. Keys before them are only loaded, queries behind
// them only get their delta. Sums are never shared, so the result does not depend on scheduling.
// What is not finite makes the CTA start again, checked (see columns.cuh): k, q and dout are
// cleansed, and a row of them that was not finite is flagged with NaN, that of q and dout in lse.
#pragma once

#include "sliding_window/fused_keys.cuh"

namespace based::cuda {

// Registers of a thread of each warpgroup. More than the CTA came with are never there: a warpgroup
// would wait for them for ever.
template <bool kDeltaGroup>
struct FusedRegisters {
  static constexpr int kLoads = kDeltaGroup ? 40 : 56, kDelta = 112;
  static constexpr int kQueries = kDeltaGroup ? 152 : 208, kKeys = kDeltaGroup ? 208 : 240;
  static_assert(kLoads + (kDeltaGroup ? kDelta : 0) + kQueries + kKeys <=
                (kDeltaGroup ? 4 * 128 : 3 * 168));
};

// Where there is no wgmma the kernel is empty, and a bound of one thread says so to the launcher.
template <class Tile>
__global__ void __launch_bounds__(kHasWgmma ? FusedShared<Tile>::kThreads : 1, 1)
    sliding_window_bwd_fused_kernel(const __grid_constant__ SlidingWindowBackwardParams p,
                                    const __grid_constant__ WindowLayout layout,
                                    const __grid_constant__ FusedLayout fused) {
  if constexpr (kHasWgmma) {
    using Element = typename Tile::Element;
    extern __shared__ __align__(1024) char bytes[];
    using Shared = FusedShared<Tile>;
    const Shared shared = {bytes, fused.key_slots, fused.q_slots};
    const int h = blockIdx.x % layout.heads;
    const TokenTile tile = token_tile(layout, blockIdx.x / layout.heads);
    const WindowSequence seq = window_sequence(layout, tile.n);
    const int V = layout.head_dim, t0 = tile.first;
    if (t0 >= seq.length) return;
    const int t_end = min(t0 + layout.rows, seq.length);
    if (seq.bad) {
      const auto dq = row_source<Element>(p.dq, seq, h), dk = row_source<Element>(p.dk, seq, h);
      const auto dv = row_source<Element>(p.dv, seq, h);
      for (int i = threadIdx.x; i < (t_end - t0) * V; i += blockDim.x) {
        const int t = t0 + i / V, column = i % V;
        const Element nan = from_float<Element>(not_a_number());
        dq.row(t)[column] = dk.row(t)[column] = dv.row(t)[column] = nan;
      }
      return;
    }
    if (threadIdx.x == 0) shared.init();
    __syncthreads();

    FusedRange range;
    range.first = t0 / kGroupRows, range.last = (t_end + kGroupRows - 1) / kGroupRows;
    range.key_first = max(0, range.first - fused.back + 1);
    range.all_last = min(range.last + fused.back - 1, (seq.length + kGroupRows - 1) / kGroupRows);
    const float scale = static_cast<float>(p.scale);
    bool again = false;
    Cursor at_k, at_q;
    const int role = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    const auto twice = [&](const auto& walk) {  // if what comes out is not finite
      do {
        const bool finite = walk();
        again = !again && any_in_block(!finite);
      } while (again);
    };
    const auto queries = [&](auto with_delta, auto with_dq) {
      const auto dq = row_source<Element>(p.dq, seq, h);
      twice([&] {
        return compute_queries<decltype(with_delta)::value, decltype(with_dq)::value>(
            shared, range, dq, fused.back, seq.length, V, layout.window, scale, again, at_k, at_q);
      });
    };
    constexpr std::true_type kYes;
    constexpr std::false_type kNo;
    using Registers = FusedRegisters<Shared::kDeltaGroup>;
    if (role == Shared::kComputing) {
      give_registers<Registers::kLoads>();
      const bool loads_keys = threadIdx.x % 128 < 64;
      const auto x = row_source<Element>(loads_keys ? p.k : p.q, seq, h);
      const auto y = row_source<Element>(loads_keys ? p.v : p.dout, seq, h);
      const auto lse = row_source<float>(p.lse, seq, h);
      twice([&] {
        if (loads_keys) {
          load_keys(shared, range, x, y, seq.length, V, again, at_k);
        } else {
          load_queries(shared, range, x, y, lse, seq.length, V, again, at_q);
        }
        return true;
      });
    } else if (role == Shared::kComputing - 1) {
      take_registers<Registers::kKeys>();
      const auto dk = row_source<Element>(p.dk, seq, h), dv = row_source<Element>(p.dv, seq, h);
      twice([&] {
        return compute_dk_dv(shared, range, p, seq, h, dk, dv, fused.back, V, layout.window, scale,
                             again, at_k, at_q);
      });
    } else if (!Shared::kDeltaGroup) {
      take_registers<Registers::kQueries>();
      queries(kYes, kYes);
    } else if (role == 0) {
      give_registers<Registers::kDelta>();
      queries(kYes, kNo);
    } else {
      take_registers<Registers::kQueries>();
      queries(kNo, kYes);
    }
  }
}

}  // namespace based::cuda
