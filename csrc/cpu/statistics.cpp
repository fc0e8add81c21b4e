// Sums of blocks to sums of tensors; see statistics.h.
#include "cpu/statistics.h"

#include <algorithm>

namespace precond {

void fold_statistics(const Plan& plan, const std::vector<int64_t>& first, const double* table, double* sums) {
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    double* const row = sums + int64_t(t.number) * kStatistics;
    std::fill_n(row, int(kStatistics), 0.0);
    if (first[size_t(i)] < 0) continue;
    row[kElements] = double(t.numel);
    const double* const begin = table + first[size_t(i)] * kBlockStatistics;
    const int64_t blocks = (t.numel + kNormBlock - 1) / kNormBlock;
    int64_t width = 1;
    while (width < blocks && width < kStatisticLanes) width *= 2;
    double lanes[kStatisticLanes][kBlockStatistics] = {};
    for (int64_t b = 0; b < blocks; ++b)
      for (int k = 0; k < kBlockStatistics; ++k) {
        double& lane = lanes[b % kStatisticLanes][k];
        lane = combined_statistic(k, lane, begin[b * kBlockStatistics + k]);
      }
    for (int64_t half = width / 2; half > 0; half /= 2)
      for (int64_t l = 0; l < half; ++l)
        for (int k = 0; k < kBlockStatistics; ++k) lanes[l][k] = combined_statistic(k, lanes[l][k], lanes[l + half][k]);
    std::copy_n(lanes[0], int(kBlockStatistics), row);
  }
}

}  // namespace precond
