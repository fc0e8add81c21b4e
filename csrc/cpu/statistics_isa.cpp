// Compiled once per instruction set, with PRECOND_ISA naming it: the lanes of a block's statistics. No STL containers
// here, so that no symbol is shared between instruction sets.
#include "cpu/statistics.h"

namespace precond {
inline namespace PRECOND_ISA {

// The product is exact, so that both have the same bits.
PRECOND_INLINE double plus_product(double sum, double a, double b) {
#if defined(__FMA__)
  return __builtin_fma(a, b, sum);
#else
  return sum + a * b;
#endif
}

// Of one lane.
struct Lane {
  double grad, param, update, along, arrived;

  PRECOND_INLINE void add(float g, float before, float u, float after) {
    grad = plus_product(grad, double(g), double(g));
    param = plus_product(param, double(before), double(before));
    update = plus_product(update, double(u), double(u));
    along = plus_product(along, double(u), double(g));
    arrived = plus_product(arrived, double(u), double(before - after));
  }
};

void clear(StatisticLanes& lanes) {
  for (auto& sum : lanes.sum)
    for (double& lane : sum) lane = 0.0;
  lanes.nonfinite = lanes.lost = 0;
  lanes.largest = 0;
}

// n lanes from the first on, each with kRows elements. Two rows at once read and write a lane once for both.
template <int kRows>
PRECOND_INLINE void add_rows(StatisticLanes& lanes, int64_t first, int64_t n, float coef, const float* __restrict g,
                             const float* __restrict before, const float* __restrict taken,
                             const float* __restrict after) {
  double* __restrict grad = lanes.sum[kGradSquares] + first;
  double* __restrict param = lanes.sum[kParamSquares] + first;
  double* __restrict update = lanes.sum[kUpdateSquares] + first;
  double* __restrict along = lanes.sum[kUpdateGrad] + first;
  double* __restrict arrived = lanes.sum[kUpdateArrived] + first;
  uint32_t nonfinite = 0, lost = 0, largest = lanes.largest;
  const auto count = [&](float x, float old, float u, float now) __attribute__((always_inline)) {
    nonfinite += is_finite(x) ? 0u : 1u;
    const uint32_t moves = u != 0.0f ? 1u : 0u, size = bits_of(u) & 0x7fffffffu;
    lost += now == old ? moves : 0u;
    largest = size > largest ? size : largest;
  };
#pragma omp simd reduction(+ : nonfinite, lost) reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    Lane lane{grad[i], param[i], update[i], along[i], arrived[i]};
    lane.add(coef * g[i], before[i], taken[i], after[i]);
    count(coef * g[i], before[i], taken[i], after[i]);
    if constexpr (kRows == 2) {
      const int64_t j = i + kStatisticLanes;
      lane.add(coef * g[j], before[j], taken[j], after[j]);
      count(coef * g[j], before[j], taken[j], after[j]);
    }
    grad[i] = lane.grad;
    param[i] = lane.param;
    update[i] = lane.update;
    along[i] = lane.along;
    arrived[i] = lane.arrived;
  }
  lanes.nonfinite += nonfinite;
  lanes.lost += lost;
  lanes.largest = largest;
}

void add_statistics(StatisticLanes& lanes, int64_t first, int64_t n, float coef, const float* g, const float* before,
                    const float* taken, const float* after) {
  for (int64_t i = 0; i < n;) {
    const int64_t lane = (first + i) % kStatisticLanes;
    int64_t done;
    if (lane == 0 && n - i >= 2 * kStatisticLanes) {
      add_rows<2>(lanes, 0, kStatisticLanes, coef, g + i, before + i, taken + i, after + i);
      done = 2 * kStatisticLanes;
    } else {
      done = n - i < kStatisticLanes - lane ? n - i : kStatisticLanes - lane;
      add_rows<1>(lanes, lane, done, coef, g + i, before + i, taken + i, after + i);
    }
    i += done;
  }
}

void fold(StatisticLanes& lanes, double* row) {
  for (int64_t half = kStatisticLanes / 2; half > 0; half /= 2)
    for (auto& sum : lanes.sum) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
  for (int k = 0; k < kStatisticSums; ++k) row[k] = lanes.sum[k][0];
  row[kNonfinite] = double(lanes.nonfinite);
  row[kLost] = double(lanes.lost);
  row[kLargestUpdate] = magnitude_of_bits(lanes.largest);
}

}  // namespace PRECOND_ISA
}  // namespace precond
