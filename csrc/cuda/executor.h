// Runs a plan on one CUDA device: the plan's tables in device memory, uploaded only where they changed, a prologue
// where scalars are only known there, and one launch per rule and formats. Compiled by nvcc, or by the tests as plain
// C++.
#pragma once

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "plan/statistics.h"

namespace precond {

// A hyper-parameter that lives in a tensor on the device.
struct Override {
  const void* value;
  int32_t group, index;
  int32_t is_double;
  int32_t padding = 0;  // tables are compared as bytes
};

static_assert(std::has_unique_object_representations_v<Override>);

// What a step on a device is given besides the groups.
struct DeviceStep {
  std::vector<Override> overrides;
  const float* grad_scale = nullptr;  // GradScaler's tensors, or null
  const float* found_inf = nullptr;
  float grad_coef = 1.0f;
  float clip_value = HUGE_VALF;
  Clip clip;
  Extras extras;
  uintptr_t stream = 0;
};

// Empty if a CUDA device can be used, else why not.
std::string why_no_cuda();
// Empty if this build has code for a device, which must be current, else why not.
std::string why_not_on(int device);

class CudaExecutor {
 public:
  // The device must be current in every call.
  explicit CudaExecutor(int device);
  ~CudaExecutor();
  CudaExecutor(const CudaExecutor&) = delete;

  // Enqueues one step on the stream and returns; no synchronisation.
  void run(Plan* plan, const std::vector<GroupRow>& groups, const DeviceStep& step);
  // Enqueues what fills step.clip.total.
  void norm(const Plan& plan, const std::vector<GroupRow>& groups, const DeviceStep& step);
  // Launches of the last step: updates, the prologue's and those of a norm that the step measured.
  int launches() const;
  // True once a step was captured into a graph, whose replays need this plan's memory.
  bool was_captured() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace precond
