// The statistics of plan/statistics.h on the CPU: lanes of a block, and what folds them.
#pragma once

#include "plan/statistics.h"

namespace precond {

// Of each tensor the sums of its blocks into its row of `sums`. table: kBlockStatistics for each block, as `first`
// says.
void fold_statistics(const Plan& plan, const std::vector<int64_t>& first, const double* table, double* sums);

inline namespace PRECOND_ISA {

struct alignas(64) StatisticLanes {
  double sum[kStatisticSums][kStatisticLanes];
  uint64_t nonfinite, lost;
  uint32_t largest;  // bits of a magnitude
};

// Functions, not parts of each rule, as those of tile.h.

void clear(StatisticLanes& lanes);
// n elements from element `first` of the block on. g: before it is multiplied with coef; after: p as it is stored now.
void add_statistics(StatisticLanes& lanes, int64_t first, int64_t n, float coef, const float* g, const float* before,
                    const float* taken, const float* after);
// A row of the table. The lanes are no longer what they were.
void fold(StatisticLanes& lanes, double* row);

}  // namespace PRECOND_ISA
}  // namespace precond
