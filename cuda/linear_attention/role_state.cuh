// Warpgroups with roles (sm_90a): warpgroup 0 keeps the state in registers and leaves its rounded
// copy as of each chunk of 64 tokens in shared memory; warpgroup 1 stores the features that the
// state's update needs; warpgroups 2 and 3 load the chunks and compute what a kernel is for, in
// turns. So the update of the state, the features and two chunks' results overlap, and no barrier
// is for all.
#pragma once

#include "linear_attention/roles.cuh"

namespace based::cuda::linear {

constexpr int kRoleThreads = 4 * kGroupThreads;
constexpr int kStateRegisters = 120, kFeatureRegisters = 56, kOutputRegisters = 168;

// What the roles share. kLoads: arrivals of a thread that complete a chunk (end_load, end_store);
// kStateWriters: warpgroups that write the state's copy. Chunk i lies in stage i % kStages, once
// `full` says so, until all three roles that read it have arrived at `free`; likewise the copies of
// the state and phi.
template <class Tr, class Stage, int kStages, int kAhead_, int kStateRows, int kLoads,
          int kStateWriters>
struct RoleRing {
  static constexpr int kAhead = kAhead_;  // chunks from the one in work to the one asked for
  static constexpr int kStates = 2;

  alignas(128) Stage stage[kStages];
  SpanPhi<Tr> phi[2];
  CoreTile<kStateRows, Tr::kF> state[kStates];
  alignas(16) char transposed[8][2 * Queries<Tr>::kHalfBytes];
  Mbarrier full[kStages], free[kStages], state_full[kStates], state_free[kStates];
  Mbarrier phi_full[2], phi_free[2];

  // By all threads; ends with a barrier.
  __device__ __forceinline__ void prepare() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i)
        full[i].init(kLoads * kGroupThreads), free[i].init(3 * kGroupThreads);
      for (int i = 0; i < 2; ++i) {
        state_full[i].init(kStateWriters * kGroupThreads), state_free[i].init(kGroupThreads);
        phi_full[i].init(kGroupThreads), phi_free[i].init(kGroupThreads);
      }
    }
    for (int i = threadIdx.x; i < kStages * kSpan; i += kRoleThreads) {
      Stage& s = stage[i / kSpan];
      *reinterpret_cast<uint4*>(s.v.at(i % kSpan, kTileV / 8)) =
          make_uint4(one<typename Tr::Element>(), 0, 0, 0);
      if constexpr (Tr::kD > Tr::D) {
        *reinterpret_cast<uint4*>(s.q.at(i % kSpan, Tr::D / 8)) = make_uint4(0, 0, 0, 0);
        *reinterpret_cast<uint4*>(s.k.at(i % kSpan, Tr::D / 8)) = make_uint4(0, 0, 0, 0);
      }
    }
    constexpr int kBelow = kStateRows - kTileV;  // z, and rows below it
    for (int i = threadIdx.x; i < kStates * kBelow * Tr::kGroups; i += kRoleThreads) {
      const int column = i / kBelow;
      *reinterpret_cast<uint4*>(state[column / Tr::kGroups].at(
          kTileV + i % kBelow, column % Tr::kGroups)) = make_uint4(0, 0, 0, 0);
    }
    mma_publish();
    __syncthreads();
  }

  __device__ __forceinline__ Stage& stage_of(int i) { return stage[i % kStages]; }
  __device__ __forceinline__ auto& state_of(int i) { return state[i % kStates]; }

  __device__ __forceinline__ Stage& begin_load(int i) {
    if (i >= kStages) free[i % kStages].wait(parity(i / kStages - 1));
    return stage_of(i);
  }
  __device__ __forceinline__ void end_load(int i) { full[i % kStages].arrive_after_copies(); }
  __device__ __forceinline__ void end_store(int i) { full[i % kStages].arrive(); }
  __device__ __forceinline__ void wait_loaded(int i) {
    full[i % kStages].wait(parity(i / kStages));
  }
  __device__ __forceinline__ void release_stage(int i) { free[i % kStages].arrive(); }

  __device__ __forceinline__ auto& begin_state(int i) {
    if (i >= kStates) state_free[i % kStates].wait(parity(i / kStates - 1));
    return state_of(i);
  }
  __device__ __forceinline__ void end_state(int i) { state_full[i % kStates].arrive(); }
  __device__ __forceinline__ void wait_state(int i) {
    state_full[i % kStates].wait(parity(i / kStates));
  }
  __device__ __forceinline__ void release_state(int i) { state_free[i % kStates].arrive(); }

  __device__ __forceinline__ SpanPhi<Tr>& begin_phi(int i) {
    if (i >= 2) phi_free[i % 2].wait(parity(i / 2 - 1));
    return phi[i % 2];
  }
  __device__ __forceinline__ void end_phi(int i) { phi_full[i % 2].arrive(); }
  __device__ __forceinline__ void wait_phi(int i) { phi_full[i % 2].wait(parity(i / 2)); }
  __device__ __forceinline__ void release_phi(int i) { phi_free[i % 2].arrive(); }
};

// The loop of the state's warpgroup. unit(i): of the copy before step i; y(stage): the rows whose
// products with phi the state sums; sums: what goes below the state's copy.
template <class Tr, class Ring, class Unit, class Y, class Sums>
__device__ __forceinline__ void walk_state(Ring& ring, StateSlice<Tr, 1>& state, int chunks,
                                           float scale, const Unit& unit, const Y& y, Sums& sums) {
  const int thread = thread_index() % kGroupThreads;
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    const auto& stage = ring.stage_of(i);
    const float units = unit(i);
    auto& sState = ring.begin_state(i);
    publish_state<Tr>(thread, sState, state, scale, units);
    sums.publish(sState, i, units);
    ring.wait_loaded(i);
    mma_publish();  // the copy of the state, and what others have copied
    ring.end_state(i);
    ring.wait_phi(i);
    mma_begin(state.sum);
    state.update(y(stage), ring.phi[i % 2], 0);
    mma_commit();
    sums.update(stage);
    mma_wait<0>(state.sum);
    ring.release_phi(i);
    ring.release_stage(i);
  }
}

// z, of which kZRows rows go below the copy of S.
template <class Tr, int kZRows>
struct KeySums {
  using Element = typename Tr::Element;
  int thread = thread_index() % kGroupThreads;
  Moments<Tr> moments{thread};
  float count = 0;  // tokens before the segment's first chunk
  float scale;

  template <class StateTile>
  __device__ __forceinline__ void publish(StateTile& sState, int i, float unit) {
    const auto store = [&](int f, float z) {
      const Element value = from_float<Element>(z * (feature_coefficient<Tr>(f, scale) * unit));
#pragma unroll
      for (int row = 0; row < kZRows; ++row) {
        *reinterpret_cast<Element*>(sState.at(kTileV + row, f / 8) + f % 8 * 2) = value;
      }
    };
    moments.for_each(store);
    if (thread == 0) store(Tr::kConstant, count + float(i * kSpan));
  }

  template <class Stage>
  __device__ __forceinline__ void update(const Stage& stage) {
    moments.update(thread % 32, stage.k, stage.v, kTileV / 8);
  }
};

// The warpgroup of S and z; `tokens`: tokens_through_span(). `final`: where the segment's last
// state goes, if anywhere.
template <class Tr, int kZRows, class Ring>
__device__ __forceinline__ void keep_state(Ring& ring, const Arguments& a, const Segment& seg,
                                           const Place& place, int chunks, float tokens,
                                           const State& final) {
  const int head = place.head, first_v = place.tile * kTileV;
  const int valid = min(kTileV, a.head_dim - first_v);
  StateSlice<Tr, 1> state;
  KeySums<Tr, kZRows> sums;
  state.clear();
  sums.scale = a.scale;
  if (!seg.first) {
    const float* prefix = a.workspace + place.index(a, seg.border - 1) * kStateFloats<Tr>;
    state.load(prefix);
    sums.moments.for_each([&](int f, float& z) { z = prefix[Tr::kF * kTileV + f]; });
    sums.count = prefix[Tr::kF * kTileV + Tr::kConstant];
  }
  if (a.initial.kv != nullptr) {
    state.add_public(a.initial, seg.sequence, head, first_v, valid, a.scale);
    const float* gZ = a.initial.k + seg.sequence * a.initial.k_sequence + head * a.initial.k_head;
    sums.moments.for_each([&](int f, float& z) {
      z += gZ[public_row<Tr>(f)] * rsqrtf(feature_coefficient<Tr>(f, a.scale));
    });
    sums.count += gZ[0];
  }
  walk_state<Tr>(
      ring, state, chunks, a.scale,
      [&](int i) { return operand_unit<Tr>(tokens + float(i * kSpan)); },
      [](const auto& stage) -> const auto& { return stage.v; }, sums);
  if (final.kv == nullptr) return;
  state.store_public(final, seg.sequence, head, first_v, valid, a.scale, 1.0f);
  if (place.tile == 0) {
    float* gZ = final.k + seg.sequence * final.k_sequence + head * final.k_head;
    sums.moments.for_each([&](int f, float& z) {
      gZ[public_row<Tr>(f)] = z * sqrtf(feature_coefficient<Tr>(f, a.scale));
    });
    if (sums.thread == 0) gZ[0] = sums.count + float(seg.end - seg.begin);
  }
}

// A chunk's results, unnormalised, times unit: out (64, N) = phi(x) S + sum of w y over the visible
// pairs of sX's rows with sOther's. The products are under way when it returns; the scores stay.
template <class Tr, Visible kVisible, int N, class Ring, class XTile, class YTile>
__device__ __forceinline__ void begin_results(float (&out)[N / 2], float (&scores)[kPairs / 2],
                                              Queries<Tr>& rows, int thread, Ring& ring, int i,
                                              const XTile& sX, const XTile& sOther, const YTile& sY,
                                              float scale, float unit, const Diagonal& diagonal) {
  using Element = typename Tr::Element;
  constexpr int kSteps = Tr::kF / 16;
  const auto& sState = ring.state_of(i);
  uint32_t w[kPairs / 16][4], phi[kSteps][4];
  const int warp = thread / 32, lane = thread % 32;
  ldmatrix_x4<false>(rows.x[0], sX.address(warp * 16 + lane % 16, lane / 16));
  mma_begin(scores);
  mma_ABt<Element, kPairs>(scores, rows.x[0], sOther, 0, 0, false);
  mma_commit();
  rows.transpose();
  rows.features(lane, phi);
  ring.wait_state(i);
  mma_begin(out);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    mma_ABt<Element, N>(out, phi[step], sState, 0, 2 * step, step > 0);
  }
  mma_commit();
  mma_wait<1>(scores);
  weights<Tr, kVisible, 0>(w, scores, scale, unit, diagonal);
#pragma unroll
  for (int j = 0; j < kSpan / 16; ++j) mma_AB<Element, N>(out, w[j], sY, 16 * j, 0);
  mma_commit();
}

// The warpgroup of the keys' features.
template <class Tr, class Ring>
__device__ __forceinline__ void keep_features(Ring& ring, int chunks) {
  const int thread = thread_index() % kGroupThreads;
#pragma unroll 1
  for (int i = 0; i < chunks; ++i) {
    ring.wait_loaded(i);
    store_features<Tr, kGroupThreads>(ring.begin_phi(i), ring.stage_of(i).k, 0, thread);
    mma_publish();
    ring.end_phi(i);
    ring.release_stage(i);
  }
}

}  // namespace based::cuda::linear
