// A step of a plan on the CPU, and the functions that it calls.
#pragma once

#include "plan/statistics.h"

namespace precond {

// What a chunk's update needs. One function per rule and instruction set.
struct ChunkArgs {
  const Tensor* tensor;
  const Strides* strides;
  const float* scalars;
  const Control* control;
  float sign;
  int64_t begin, count;
  double* statistics;  // kBlockStatistics for each block, from that of the first element on; null: none are taken
  bool only;           // nothing is updated
};
using UpdateChunk = void (*)(const ChunkArgs&);

// Advances the step counters of the active tensors and updates them, in one parallel region. Changes nothing when
// control.skip is set.
void run_on_cpu(Plan* plan, const std::vector<GroupRow>& groups, const Control& control, int threads,
                const Extras& extras = {});

}  // namespace precond
