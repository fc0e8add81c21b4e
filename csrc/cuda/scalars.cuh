// The prologue of a step: scalars that are only known on the device. One thread per tensor.
#pragma once

#include "cuda/executor.h"
#include "cuda/tensors.cuh"
#include "rules/rule.h"

namespace precond {

struct ScalarsJob {
  void* step;         // counter on the device, advanced here; null: the host has counted
  void* scalar;       // scalar state on the device, advanced with it; null: none, or advanced by the host
  double known_step;  // where the host has counted; already advanced, like the next
  double known_scalar;
  NumberType step_type, scalar_type;
  int32_t group;  // -1: inactive in this step
  int32_t fresh;
  int32_t draws;
  uint64_t key;
  const float* factor;  // on updates, of a rule with parts; null: 1
};
struct DeviceGroup {
  int32_t rule;
  double hyper[kMaxHyper];
};

inline namespace PRECOND_ISA {

// A group's hyper-parameters, as they are on the device.
__device__ __forceinline__ void read_overrides(const Override* overrides, int32_t count, int32_t group, double* hyper) {
  for (int32_t o = 0; o < count; ++o) {
    if (overrides[o].group != group) continue;
    hyper[overrides[o].index] = overrides[o].is_double ? *static_cast<const double*>(overrides[o].value)
                                                       : double(*static_cast<const float*>(overrides[o].value));
  }
}

// Counts the step, unless it is skipped, and fills a tensor's scalars.
template <class Rule>
__device__ __forceinline__ void prepare(const ScalarsJob& job, const double* hyper, bool skip, float* scalars) {
  double step = job.known_step, scalar = job.known_scalar;
  if (job.step != nullptr) {
    step = next_step(job.step_type, read_number(job.step, job.step_type));
    if (!skip) write_number(job.step, job.step_type, step);
  }
  if constexpr (Rule::kScalarStates != 0) {
    if (job.scalar != nullptr) {
      const double before = read_number(job.scalar, job.scalar_type);
      scalar = rounded_number(job.scalar_type, advanced<Rule>(hyper, step, before));
      if (!skip) write_number(job.scalar, job.scalar_type, scalar);
    }
  }
  fill_scalars<Rule>(hyper, step, job.fresh != 0, scalar, scalars);
  if constexpr (kHasParts<Rule>)
    if (job.factor != nullptr) scalars[sizeof(Rule) / sizeof(float) - 1] = *job.factor;
  if (job.draws) put_seed(seed_of(job.key, uint64_t(countable(step))), scalars);
}

}  // namespace PRECOND_ISA
}  // namespace precond
