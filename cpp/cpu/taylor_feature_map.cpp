// The Taylor feature map as an op of its own: tiles of 64 vectors, feature-major inside.
#include <cmath>

#include "element.h"
#include "simd.h"
#include "tasks.h"
#include "taylor.h"

namespace based::cpu::BASED_ISA {
namespace {

constexpr int kTile = 64;

// Vectors of a (..., D) tensor, and the element offset of one of them.
int64_t vector_count(const TensorView& view) {
  int64_t count = 1;
  for (int i = 0; i < view.rank - 1; ++i) count *= view.size[i];
  return count;
}

int64_t vector_offset(const TensorView& view, int64_t index) {
  int64_t offset = 0;
  for (int i = view.rank - 2; i >= 0; --i) {
    offset += index % view.size[i] * view.stride[i];
    index /= view.size[i];
  }
  return offset;
}

// tile (width, kTile) <- vectors [first, first + count) times `factor`; other columns are 0.
template <class T>
void load_tile(T* tile, T* row, const TensorView& view, int64_t first, int64_t count, T factor) {
  const int64_t width = view.size[view.rank - 1];
  for (int64_t i = 0; i < width * kTile; ++i) tile[i] = 0;
  for (int64_t t = 0; t < count; ++t) {
    load(row, view.data, view.dtype, vector_offset(view, first + t), width);
    for (int64_t j = 0; j < width; ++j) tile[j * kTile + t] = row[j] * factor;
  }
}

template <class T>
void store_tile(const TensorView& view, int64_t first, int64_t count, const T* tile, T* row,
                T factor) {
  const int64_t width = view.size[view.rank - 1];
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t j = 0; j < width; ++j) row[j] = tile[j * kTile + t] * factor;
    store(view.data, view.dtype, vector_offset(view, first + t), row, width);
  }
}

// Calls body(first, count, x, row, rest) for every tile of vectors; rest has room for two more
// tiles of F rows.
template <class T, class BodyFn>
bool for_each_tile(const TaylorFeatureMapParams& p, ParallelFor parallel, const BodyFn& body) {
  const int64_t D = p.x.size[p.x.rank - 1], F = expanded_dim(D), count = vector_count(p.x);
  const int64_t scratch_size = D * kTile + F + 2 * F * kTile;
  return for_each_task<T>(
      parallel, (count + kTile - 1) / kTile, scratch_size, [&](int64_t task, T* scratch) {
        const int64_t first = task * kTile, n = count - first < kTile ? count - first : kTile;
        T *x = scratch, *rest = x + D * kTile, *row = rest + 2 * F * kTile;
        load_tile(x, row, p.x, first, n, T(std::sqrt(p.scale)));
        body(first, n, x, row, rest);
      });
}

template <class T>
bool forward(const TaylorFeatureMapParams& p, ParallelFor parallel) {
  const int64_t D = p.x.size[p.x.rank - 1];
  return for_each_tile<T>(p, parallel, [&](int64_t first, int64_t n, T* x, T* row, T* phi) {
    taylor_tile<T, kTile>(D, x, phi);
    store_tile(p.out, first, n, phi, row, T(1));
  });
}

template <class T>
bool backward(const TaylorFeatureMapBackwardParams& p, ParallelFor parallel) {
  const int64_t D = p.x.size[p.x.rank - 1], F = expanded_dim(D);
  return for_each_tile<T>(p, parallel, [&](int64_t first, int64_t n, T* x, T* row, T* dphi) {
    load_tile(dphi, row, p.dout, first, n, T(1));
    T* dx = dphi + F * kTile;
    taylor_tile_backward<T, kTile>(D, x, dphi, dx);
    store_tile(p.dx, first, n, dx, row, T(std::sqrt(p.scale)));
  });
}

}  // namespace

bool taylor_feature_map(const TaylorFeatureMapParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? forward<double>(p, parallel) : forward<float>(p, parallel);
}

bool taylor_feature_map_backward(const TaylorFeatureMapBackwardParams& p, ParallelFor parallel) {
  return p.x.dtype == DType::kFloat64 ? backward<double>(p, parallel)
                                      : backward<float>(p, parallel);
}

}  // namespace based::cpu::BASED_ISA
