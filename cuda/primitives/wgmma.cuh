// wgmma, the tensor-core instruction of a warpgroup (sm_90a): D (64, N) fp32 += A (64, 16) B (16,
// N). A comes from registers (wgmma_rs) or shared memory (wgmma_ss), B from shared memory, D stays
// in registers: warp w of the warpgroup holds rows 16w ... 16w+15 as N/8 tiles of mma.sync's
// layout. Asynchronous: registers and tiles are in use from wgmma_fence() to wgmma_wait().
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace based::cuda {

// Orders this thread's register writes before the wgmmas that follow.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

// Waits until at most `kPending` committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}

// An operand tile without swizzle: core matrices of 8 x 16 bytes, `k_stride` bytes from one to the
// next along k, `mn_stride` along the other dimension.
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t k_stride,
                                                     uint32_t mn_stride) {
  const auto field = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffff) >> 4); };
  return field(address) | field(k_stride) << 16 | field(mn_stride) << 32;
}

// The same for a tile of rows of 128 bytes along k, 1024-byte aligned, whose 16-byte chunks are
// permuted: chunk c of row r lies at c xor r mod 8. A step along k adds its bytes / 16.
__device__ __forceinline__ uint64_t wgmma_swizzled_descriptor(uint32_t address) {
  return uint64_t(1024 / 16 | 1u << 30) << 32 | (address / 16 + 65536u);
}

#define BASED_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BASED_ACC8(i) BASED_ACC4(i), BASED_ACC4(i + 4)
#define BASED_ALL4 BASED_ACC4(0)
#define BASED_ALL8 BASED_ACC8(0)
#define BASED_ALL12 BASED_ACC8(0), BASED_ACC4(8)
#define BASED_ALL16 BASED_ACC8(0), BASED_ACC8(8)
#define BASED_ALL24 BASED_ALL16, BASED_ACC8(16)
#define BASED_ALL32 BASED_ALL24, BASED_ACC8(24)
#define BASED_ALL36 BASED_ALL32, BASED_ACC4(32)
#define BASED_ALL40 BASED_ALL32, BASED_ACC8(32)
#define BASED_ALL64 BASED_ALL40, BASED_ACC8(40), BASED_ACC8(48), BASED_ACC8(56)
#define BASED_ALL72 BASED_ALL64, BASED_ACC8(64)
#define BASED_ALL80 BASED_ALL72, BASED_ACC8(72)
#define BASED_ALL84 BASED_ALL72, BASED_ACC8(72), BASED_ACC4(80)
#define BASED_REGS4 "%0,%1,%2,%3"
#define BASED_REGS8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define BASED_REGS12 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11"
#define BASED_REGS16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define BASED_REGS24                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23"
#define BASED_REGS32                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define BASED_REGS36                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35"
#define BASED_REGS40                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define BASED_REGS64                                                                           \
  BASED_REGS40                                                                                 \
  ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%" \
  "62,%63"
#define BASED_REGS72                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"   \
  "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"   \
  "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71"
#define BASED_REGS80                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"   \
  "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"   \
  "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,"   \
  "%79"
#define BASED_REGS84                                                               \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,"   \
  "%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,"   \
  "%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,"   \
  "%79,%80,%81,%82,%83"

// kTransposeB: B is stored k-major rows of n (n contiguous) instead of n-major rows of k.
template <class Element, int N, bool kTransposeB>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
#define BASED_WGMMA_RS(n, regs, type, a0, a1, a2, a3, desc, acc, trans)                    \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #acc                                      \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type             \
               " {" BASED_REGS##regs "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #desc   \
                                     ", p, 1, 1, %" #trans ";}\n"                          \
               : BASED_ALL##regs                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
                 "n"(int(kTransposeB)))
  if constexpr (N == 8 && !kHalf) {
    BASED_WGMMA_RS(8, 4, "bf16", 4, 5, 6, 7, 8, 9, 10);
  } else if constexpr (N == 16 && !kHalf) {
    BASED_WGMMA_RS(16, 8, "bf16", 8, 9, 10, 11, 12, 13, 14);
  } else if constexpr (N == 128 && !kHalf) {
    BASED_WGMMA_RS(128, 64, "bf16", 64, 65, 66, 67, 68, 69, 70);
  } else if constexpr (N == 32 && !kHalf) {
    BASED_WGMMA_RS(32, 16, "bf16", 16, 17, 18, 19, 20, 21, 22);
  } else if constexpr (N == 32) {
    BASED_WGMMA_RS(32, 16, "f16", 16, 17, 18, 19, 20, 21, 22);
  } else if constexpr (N == 48 && !kHalf) {
    BASED_WGMMA_RS(48, 24, "bf16", 24, 25, 26, 27, 28, 29, 30);
  } else if constexpr (N == 48) {
    BASED_WGMMA_RS(48, 24, "f16", 24, 25, 26, 27, 28, 29, 30);
  } else if constexpr (N == 64 && !kHalf) {
    BASED_WGMMA_RS(64, 32, "bf16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (N == 64) {
    BASED_WGMMA_RS(64, 32, "f16", 32, 33, 34, 35, 36, 37, 38);
  } else if constexpr (N == 72 && !kHalf) {
    BASED_WGMMA_RS(72, 36, "bf16", 36, 37, 38, 39, 40, 41, 42);
  } else if constexpr (N == 72) {
    BASED_WGMMA_RS(72, 36, "f16", 36, 37, 38, 39, 40, 41, 42);
  } else if constexpr (N == 80 && !kHalf) {
    BASED_WGMMA_RS(80, 40, "bf16", 40, 41, 42, 43, 44, 45, 46);
  } else if constexpr (N == 80) {
    BASED_WGMMA_RS(80, 40, "f16", 40, 41, 42, 43, 44, 45, 46);
  } else {
    static_assert(N == 0, "no wgmma wrapper for this N");
  }
#undef BASED_WGMMA_RS
}

// The same with A (64, 16) in shared memory, stored as rows of k (64 contiguous), and B as rows of
// k.
template <class Element, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
#define BASED_WGMMA_SS(n, regs, type, adesc, bdesc)                                  \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type       \
               " {" BASED_REGS##regs "}, %" #adesc ", %" #bdesc ", 1, 1, 1, 1, 1;\n" \
               : BASED_ALL##regs                                                     \
               : "l"(a), "l"(b))
  if constexpr (N == 8 && !kHalf) {
    BASED_WGMMA_SS(8, 4, "bf16", 4, 5);
  } else if constexpr (N == 8) {
    BASED_WGMMA_SS(8, 4, "f16", 4, 5);
  } else if constexpr (N == 24 && !kHalf) {
    BASED_WGMMA_SS(24, 12, "bf16", 12, 13);
  } else if constexpr (N == 24) {
    BASED_WGMMA_SS(24, 12, "f16", 12, 13);
  } else if constexpr (N == 48 && !kHalf) {
    BASED_WGMMA_SS(48, 24, "bf16", 24, 25);
  } else if constexpr (N == 48) {
    BASED_WGMMA_SS(48, 24, "f16", 24, 25);
  } else if constexpr (N == 80 && !kHalf) {
    BASED_WGMMA_SS(80, 40, "bf16", 40, 41);
  } else if constexpr (N == 80) {
    BASED_WGMMA_SS(80, 40, "f16", 40, 41);
  } else if constexpr (N == 144 && !kHalf) {
    BASED_WGMMA_SS(144, 72, "bf16", 72, 73);
  } else if constexpr (N == 144) {
    BASED_WGMMA_SS(144, 72, "f16", 72, 73);
  } else if constexpr (N == 160 && !kHalf) {
    BASED_WGMMA_SS(160, 80, "bf16", 80, 81);
  } else if constexpr (N == 160) {
    BASED_WGMMA_SS(160, 80, "f16", 80, 81);
  } else if constexpr (N == 168 && !kHalf) {
    BASED_WGMMA_SS(168, 84, "bf16", 84, 85);
  } else if constexpr (N == 168) {
    BASED_WGMMA_SS(168, 84, "f16", 84, 85);
  } else {
    static_assert(N == 0, "no wgmma wrapper for this N");
  }
#undef BASED_WGMMA_SS
}

// The same with both operands stored as rows of k (k contiguous): d (64, N) (+)= A (64, 16) times
// the transpose of B (N, 16).
template <class Element, int kSums>
__device__ __forceinline__ void wgmma_ss_nt(float (&d)[kSums], uint64_t a, uint64_t b,
                                            bool accumulate) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
#define BASED_WGMMA_SS_NT(n, regs, type, adesc, bdesc, acc)                           \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #acc                                 \
               ", 0;\n"                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type        \
               " {" BASED_REGS##regs "}, %" #adesc ", %" #bdesc ", p, 1, 1, 0, 0;}\n" \
               : BASED_ALL##regs                                                      \
               : "l"(a), "l"(b), "r"(int(accumulate)))
  if constexpr (kSums == 4 && !kHalf) {
    BASED_WGMMA_SS_NT(8, 4, "bf16", 4, 5, 6);
  } else if constexpr (kSums == 4) {
    BASED_WGMMA_SS_NT(8, 4, "f16", 4, 5, 6);
  } else if constexpr (kSums == 8 && !kHalf) {
    BASED_WGMMA_SS_NT(16, 8, "bf16", 8, 9, 10);
  } else if constexpr (kSums == 8) {
    BASED_WGMMA_SS_NT(16, 8, "f16", 8, 9, 10);
  } else if constexpr (kSums == 16 && !kHalf) {
    BASED_WGMMA_SS_NT(32, 16, "bf16", 16, 17, 18);
  } else if constexpr (kSums == 16) {
    BASED_WGMMA_SS_NT(32, 16, "f16", 16, 17, 18);
  } else if constexpr (kSums == 32 && !kHalf) {
    BASED_WGMMA_SS_NT(64, 32, "bf16", 32, 33, 34);
  } else if constexpr (kSums == 32) {
    BASED_WGMMA_SS_NT(64, 32, "f16", 32, 33, 34);
  } else if constexpr (kSums == 64 && !kHalf) {
    BASED_WGMMA_SS_NT(128, 64, "bf16", 64, 65, 66);
  } else {
    static_assert(kSums == 0, "no wgmma wrapper for this N");
  }
#undef BASED_WGMMA_SS_NT
}

}  // namespace based::cuda
