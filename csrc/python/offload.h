// A link for Python: what a step needs lives until the host is done with it.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "offload/link.h"

namespace py = pybind11;

namespace precond {

class HostLink {
 public:
  HostLink(int device, size_t slot);
  // After its jobs. Never waits for Python: no other thread of it uses the interpreter.
  ~HostLink();

  void join(uintptr_t stream);
  void wait();
  void wait_for(const std::shared_ptr<HostJob>& job);
  uintptr_t reads() const;
  // `held` lives until the device has the new parameters.
  std::shared_ptr<HostJob> submit(HostStep step, py::object held);

 private:
  // CUDA does not work in a forked process, and the threads are not there.
  bool is_here() const;
  void require_here() const;

  std::unique_ptr<Link> link_;
  int process_;
};

// A block of pinned memory as a buffer, whose memory views keep it alive.
void declare_offload(py::module_& m);

}  // namespace precond
