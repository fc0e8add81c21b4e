// Where each block's sum goes; see norm.h.
#include "plan/norm.h"

namespace precond {

NormTable norm_table(const Plan& plan, int classes) {
  NormTable table;
  table.first.assign(size_t(plan.size()), -1);
  table.begin.assign(1, 0);
  for (int c = 0; c < classes; ++c) {
    int64_t next = table.begin.back();
    for (int64_t i = 0; i < plan.size(); ++i) {
      const Tensor& t = plan.tensor(i);
      if (!t.active || t.norm_class != c) continue;
      table.first[size_t(i)] = next;
      next += (t.numel + kNormBlock - 1) / kNormBlock;
    }
    table.begin.push_back(next);
  }
  return table;
}

}  // namespace precond
