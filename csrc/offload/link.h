// Between a device that has parameters and gradients and the host that has their states: gradients come in pieces, the
// host's threads update, and the new parameters go back, all at the same time. Everything is enqueued by submit(), in
// an order in which each thing waits for earlier ones alone; flags in pinned memory order what the host does with what
// streams do, so that no thread but the caller's uses CUDA for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "offload/pinned.h"
#include "plan/statistics.h"

namespace precond {

// One update on the host of tensors whose parameters and gradients are on the device.
struct HostStep {
  Plan* plan = nullptr;  // p and states are the host's, gradients the device's; all of them dense in the visiting order
  const std::vector<GroupRow>* groups = nullptr;
  std::vector<void*> params;  // of each tensor of the plan where its p is on the device
  // Numbers on the device, or null; `total` of the clip too.
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  float grad_coef = 1.0f;
  float clip_value = HUGE_VALF;
  Clip clip;
  Extras extras;
  uintptr_t stream = 0;  // whose work so far has the gradients, and has read the parameters
  int threads = 1;
  std::shared_ptr<void> held;  // what lives until the job is done and its parameters are on the device
};

// A step that was handed in. Its states and counters are the host's to use once it is done.
class HostJob {
 public:
  virtual ~HostJob() = default;
  virtual bool done() const = 0;
};

class Link {
 public:
  // slot: the largest piece of gradients in bytes. The device must be current here and in every call but wait(). Calls
  // of several threads follow each other; what is held is let go within them, so that none may have Python's lock.
  Link(int device, size_t slot);
  ~Link();  // waits
  Link(const Link&) = delete;

  // Returns as soon as everything is enqueued. `plan` may be used again at once, but not for a step before this one is
  // done.
  std::shared_ptr<HostJob> submit(const HostStep& step);
  // Has a stream wait until the parameters of all jobs so far are on the device.
  void join(uintptr_t stream);
  // Until all jobs are done and their parameters on the device, or until one job is done; throws an error, once.
  void wait();
  void wait_for(const std::shared_ptr<HostJob>& job);
  // The stream that reads gradients.
  uintptr_t reads() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace precond
