// See offload.h.
#include "python/offload.h"

#include <unistd.h>

#include <stdexcept>
#include <utility>

namespace precond {

#if defined(PRECOND_CUDA)

HostLink::HostLink(int device, size_t slot) : link_(std::make_unique<Link>(device, slot)), process_(getpid()) {}

HostLink::~HostLink() {
  if (!is_here()) {
    static_cast<void>(link_.release());
    return;
  }
#if PY_VERSION_HEX >= 0x030d0000
  const bool ends = Py_IsFinalizing() != 0;
#else
  const bool ends = _Py_IsFinalizing() != 0;
#endif
  // A device may wait for what another thread of Python has yet to launch; at the end there is none.
  if (ends) {
    link_.reset();
  } else {
    const py::gil_scoped_release release;
    link_.reset();
  }
}

bool HostLink::is_here() const { return getpid() == process_; }

void HostLink::require_here() const {
  if (!is_here()) throw std::runtime_error("offload must be None in a forked process: CUDA does not work there");
}

void HostLink::join(uintptr_t stream) {
  require_here();
  const py::gil_scoped_release release;
  link_->join(stream);
}

void HostLink::wait() {
  if (!is_here()) return;
  const py::gil_scoped_release release;
  link_->wait();
}

void HostLink::wait_for(const std::shared_ptr<HostJob>& job) {
  require_here();
  const py::gil_scoped_release release;
  link_->wait_for(job);
}

uintptr_t HostLink::reads() const { return link_->reads(); }

std::shared_ptr<HostJob> HostLink::submit(HostStep step, py::object held) {
  require_here();
  step.held = std::shared_ptr<void>(new py::object(std::move(held)), [](void* object) {
    const py::gil_scoped_acquire acquire;
    delete static_cast<py::object*>(object);
  });
  const py::gil_scoped_release release;
  return link_->submit(step);
}

void declare_offload(py::module_& m) {
  py::class_<Pinned>(m, "Pinned", py::buffer_protocol())
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_static(
          "has", [](uintptr_t address) { return Pinned::has(reinterpret_cast<const void*>(address)); },
          py::arg("address"))
      .def_buffer([](const Pinned& p) {
        return py::buffer_info(p.data(), 1, py::format_descriptor<uint8_t>::format(), py::ssize_t(p.bytes()));
      });
  py::class_<HostLink>(m, "Link")
      .def(py::init<int, size_t>(), py::arg("device"), py::arg("slot"))
      .def("join", &HostLink::join, py::arg("stream"))
      .def("wait", &HostLink::wait)
      .def_property_readonly("reads", &HostLink::reads);
}

#else

void declare_offload(py::module_&) {}

#endif

}  // namespace precond
