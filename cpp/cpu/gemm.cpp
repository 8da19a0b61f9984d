#include "gemm.h"

#include "simd.h"

namespace based::cpu::BASED_ISA {
namespace {

// One register tile: kRows rows of C, kVectors vectors wide. `columns` is that of the first row.
template <class T, int kRows, int kVectors>
void tile(Columns columns, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t ldb,
          T* c, int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[kRows][kVectors] = {};
  if (accumulate) {
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kVectors; ++n) sum[m][n] = load_vector(c + m * ldc + n * L);
  }
  const auto add_column = [&](int64_t k, auto&& is_active) {
    Vector<T> row[kVectors];
    for (int n = 0; n < kVectors; ++n) row[n] = load_vector(b + k * ldb + n * L);
    for (int m = 0; m < kRows; ++m) {
      if (!is_active(m)) continue;
      const T x = a[m * a_row + k * a_column];
      for (int n = 0; n < kVectors; ++n) sum[m][n] += row[n] * x;
    }
  };
  const auto ragged = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      add_column(k, [&](int m) {
        return k >= columns.begin + m * columns.begin_step &&
               k < columns.end + m * columns.end_step;
      });
    }
  };
  // All rows share [full_begin, full_end); the slanted ends are at most kRows - 1 columns each.
  const int64_t end = columns.end + (kRows - 1) * columns.end_step;
  int64_t full_begin = columns.begin + (kRows - 1) * columns.begin_step, full_end = columns.end;
  if (full_begin >= full_end) full_begin = full_end = end;
  ragged(columns.begin, full_begin);
  for (int64_t k = full_begin; k < full_end; ++k) add_column(k, [](int) { return true; });
  ragged(full_end, end);
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kVectors; ++n) store_vector(c + m * ldc + n * L, sum[m][n]);
}

// tile<kRows, kVectors> with kRows = rows <= the template's.
template <class T, int kRows, int kVectors, class... Args>
void tile_of(int64_t rows, Args... args) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<T, kRows - 1, kVectors>(rows, args...);
  }
  tile<T, kRows, kVectors>(args...);
}

template <class T, int kVectors>
void column_panel(int64_t M, Columns columns, const T* a, int64_t a_row, int64_t a_column,
                  const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  for (int64_t m = 0; m < M; m += kTileRows) {
    const int64_t rows = M - m < kTileRows ? M - m : kTileRows;
    const Columns shifted = {columns.begin + m * columns.begin_step,
                             columns.end + m * columns.end_step, columns.begin_step,
                             columns.end_step};
    tile_of<T, kTileRows, kVectors>(rows, shifted, a + m * a_row, a_row, a_column, b, ldb,
                                    c + m * ldc, ldc, accumulate);
  }
}

}  // namespace

template <class T>
void gemm(int64_t M, int64_t N, Columns columns, const T* a, int64_t a_row, int64_t a_column,
          const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int64_t kWide = kTileVectors * kLanes<T>;
  int64_t n = 0;
  for (; n + kWide <= N; n += kWide) {
    column_panel<T, kTileVectors>(M, columns, a, a_row, a_column, b + n, ldb, c + n, ldc,
                                  accumulate);
  }
  for (; n < N; n += kLanes<T>) {
    column_panel<T, 1>(M, columns, a, a_row, a_column, b + n, ldb, c + n, ldc, accumulate);
  }
}

template void gemm(int64_t, int64_t, Columns, const float*, int64_t, int64_t, const float*, int64_t,
                   float*, int64_t, bool);
template void gemm(int64_t, int64_t, Columns, const double*, int64_t, int64_t, const double*,
                   int64_t, double*, int64_t, bool);

}  // namespace based::cpu::BASED_ISA
