// The matrix product that every attention kernel is made of.
#pragma once

#include <cstdint>

namespace based::cpu::BASED_ISA {

// Columns that row m of A contributes: [begin + m * begin_step, end + m * end_step), steps 0 or 1.
// {0, K} is a full product, {0, 1, 0, 1} the lower triangle, {0, K, 1, 0} the upper one. Columns
// outside the range are not read, so a NaN there stays there.
struct Columns {
  int64_t begin, end;
  int begin_step = 0, end_step = 0;
};

// C (M, N) = A B, or += with accumulate. A(m, k) = a[m * a_row + k * a_column]; B (K, N) and C are
// row-major with row strides ldb and ldc; N is a multiple of kLanes<T>.
template <class T>
void gemm(int64_t M, int64_t N, Columns columns, const T* a, int64_t a_row, int64_t a_column,
          const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate);

}  // namespace based::cpu::BASED_ISA
