// Where each block's sums go; see statistics.h.
#include "plan/statistics.h"

namespace precond {

std::vector<int64_t> statistic_blocks(const Plan& plan) {
  std::vector<int64_t> first;
  int64_t next = 0;
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    first.push_back(t.active ? next : -1);
    if (t.active) next += (t.numel + kNormBlock - 1) / kNormBlock;
  }
  first.push_back(next);
  return first;
}

}  // namespace precond
