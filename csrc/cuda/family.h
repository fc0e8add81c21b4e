// What a family's units hand over to executor.cu: functions that launch the kernels of its rules.
#pragma once

#include "cuda/launch.h"
#include "cuda/scalars.cuh"
#include "cuda/statistics.cuh"

namespace precond {

struct UpdateArgs {
  const DeviceTensor* tensors;
  const DeviceChunk* chunks;
  const Strides* strides;
  const float* scalars;
  const Control* control;
  int64_t blocks;
  cudaStream_t stream;
  const Noting* noting;  // on the device; for rules with parts alone
};
using LaunchUpdate = void (*)(const UpdateArgs&);

// A kernel for each formats of p, g and states, where all stand alone and are dense; null where there is none. The last
// one takes any strides.
constexpr int kAny = kPlainFormats * kPlainFormats * kPlainFormats;
struct PlainKernels {
  LaunchUpdate launch[kAny + 1];
};

// Formats that have kernels of their own, fixed.cuh: of p, g, means and second moments. Those with bf16 states differ
// from plain kernels only in a second moment that is drawn, so they are for rules that have one.
#define PRECOND_FIXED(FIXED)              \
  PRECOND_OFTEN_CODED(FIXED)              \
  FIXED(Bf16Split32, Bf16, Fp32, Fp32)    \
  FIXED(Fp32, Fp32, Bf16, Bf16Stochastic) \
  FIXED(Bf16, Bf16, Bf16, Bf16Stochastic)
#define PRECOND_ONE(...) +1
constexpr int kFixedFormats = PRECOND_FIXED(PRECOND_ONE);
#undef PRECOND_ONE
// In this order; null where there is none.
struct FixedKernels {
  LaunchUpdate launch[kFixedFormats];
};

// `first`: the number of the family's first rule.
struct ScalarsArgs {
  const ScalarsJob* jobs;
  int32_t count;
  const DeviceGroup* groups;
  const Override* overrides;
  int32_t override_count;
  const Control* control;
  int32_t first;
  bool counts;  // false: counters and scalar states stay as they are
  float* scalars;
  cudaStream_t stream;
};
using LaunchScalars = void (*)(const ScalarsArgs&);

}  // namespace precond
