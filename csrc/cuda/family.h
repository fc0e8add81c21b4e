// What a family's units hand over to executor.cu: functions that launch the kernels of its rules.
#pragma once

#include "cuda/launch.h"
#include "cuda/scalars.cuh"

namespace precond {

struct UpdateArgs {
  const DeviceTensor* tensors;
  const DeviceChunk* chunks;
  const Strides* strides;
  const float* scalars;
  const Control* control;
  int64_t blocks;
  cudaStream_t stream;
};
using LaunchUpdate = void (*)(const UpdateArgs&);

// A kernel for each formats of p, g and states, where all stand alone and are dense; null where there is none. The last
// one takes any layout and mix of these formats.
constexpr int kAny = kPlainFormats * kPlainFormats * kPlainFormats;
struct PlainKernels {
  LaunchUpdate launch[kAny + 1];
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
  float* scalars;
  cudaStream_t stream;
};
using LaunchScalars = void (*)(const ScalarsArgs&);

}  // namespace precond
