// A link for Python: what a step needs lives until the host is done with it.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <utility>
#include <vector>

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
  std::shared_ptr<HostJob> submit(const HostStep& step, py::object held);

 private:
  // Lets go of what is needed no more.
  void drop();
  // CUDA does not work in a forked process, and the threads are not there.
  bool is_here() const;
  void require_here() const;

  std::vector<std::pair<std::shared_ptr<HostJob>, py::object>> held_;
  std::unique_ptr<Link> link_;
  int process_;
};

// A block of pinned memory as a buffer, whose memory views keep it alive.
void declare_offload(py::module_& m);

}  // namespace precond
