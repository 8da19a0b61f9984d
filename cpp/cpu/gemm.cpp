#include "gemm.h"

#include "simd.h"

namespace based::cpu::BASED_ISA {
namespace {

// Adds columns [begin, end) of A to rows of C that are kVectors vectors wide.
template <class T, int kRows, int kVectors>
void add_columns(int64_t begin, int64_t end, const T* a, int64_t a_row, int64_t a_column,
                 const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  constexpr int L = kLanes<T>;
  Vector<T> sum[kRows][kVectors] = {};
  if (accumulate) {
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kVectors; ++n) sum[m][n] = load_vector(c + m * ldc + n * L);
  }
  for (int64_t k = begin; k < end; ++k) {
    Vector<T> row[kVectors];
    for (int n = 0; n < kVectors; ++n) row[n] = load_vector(b + k * ldb + n * L);
    for (int m = 0; m < kRows; ++m) {
      const T x = a[m * a_row + k * a_column];
      for (int n = 0; n < kVectors; ++n) sum[m][n] += row[n] * x;
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kVectors; ++n) store_vector(c + m * ldc + n * L, sum[m][n]);
}

// One register tile: the columns that all kRows rows share, then each row's slanted ends, at most
// kRows - 1 columns each. `columns` is that of the first row.
template <class T, int kRows, int kVectors>
void tile(Columns columns, const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t ldb,
          T* c, int64_t ldc, bool accumulate) {
  const int64_t end = columns.end + (kRows - 1) * columns.end_step;
  int64_t full_begin = columns.begin + (kRows - 1) * columns.begin_step, full_end = columns.end;
  if (full_begin >= full_end) full_begin = full_end = end;
  add_columns<T, kRows, kVectors>(full_begin, full_end, a, a_row, a_column, b, ldb, c, ldc,
                                  accumulate);
  if (columns.begin_step == 0 && columns.end_step == 0 && full_end == columns.end) return;
  for (int64_t m = 0; m < kRows; ++m) {
    const int64_t row_begin = columns.begin + m * columns.begin_step;
    const int64_t row_end = columns.end + m * columns.end_step;
    const auto add = [&](int64_t from, int64_t to) {
      if (from < to) {
        add_columns<T, 1, kVectors>(from, to, a + m * a_row, a_row, a_column, b, ldb, c + m * ldc,
                                    ldc, true);
      }
    };
    add(row_begin, row_end < full_begin ? row_end : full_begin);
    add(row_begin > full_end ? row_begin : full_end, row_end);
  }
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
