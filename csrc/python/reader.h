// What a tensor object says of its memory, read without the headers of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "formats/formats.h"
#include "python/dlpack.h"

namespace precond {

namespace py = pybind11;

constexpr int kCpuDevice = -1, kOtherDevice = -2;  // CUDA devices count from 0

// What a tensor object says of its memory; complex64 is fp32 with a last dimension of two. `shape` and `strides` live
// in the object or in `owned`.
struct View {
  char* data = nullptr;
  Storage storage = Storage::none;  // none: of another dtype
  int device = kOtherDevice;
  int itemsize = 0;
  bool complex = false;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;
  std::vector<int64_t> owned;
  py::object plain;  // the tensor behind a wrapper, which may exist only for this view
  // The tensor that was read: the one behind a wrapper, or the object itself.
  py::handle read_of(py::handle object) const { return plain ? py::handle(plain) : object; }
};

// True for what the kernels take as values.
inline bool is_value(Storage storage) {
  return storage == Storage::fp32 || storage == Storage::bf16 || storage == Storage::fp16;
}

inline bool is_one_element(const View& view) {
  return std::all_of(view.shape, view.shape + view.ndim, [](int64_t n) { return n == 1; });
}

// The states of each parameter, from optimizer.state, by one walk: a look-up calls a tensor's hash, a Python function.
using StateOf = std::unordered_map<PyObject*, py::object>;
StateOf states_by_param(const py::dict& state);

// Reads tensors through DLPack's exchange table where torch has one (2.10 and newer), else through their methods.
class Reader {
 public:
  // tensor_types: the types whose memory is read as it is. slots_of: for any other type (DTensor) the slots that have
  // the plain tensor and how it is placed, or None. local: gives the plain tensor where there are no such slots, or the
  // first has another wrapper (a tensor that is still on its way).
  Reader(py::tuple tensor_types, py::object slots_of, py::object local, bool use_exchange);
  // Throws py::error_already_set where the object has no memory to show (sparse, meta).
  void read(PyObject* object, View* view) const;
  // How two wrappers are placed that are placed alike.
  struct Placed {
    py::object a, b;
  };
  // False for two of one wrapper's type that are placed on other meshes or otherwise: their local tensors are not
  // pieces of the same elements. known: what was compared before, which is quicker.
  bool placed_alike(PyObject* a, PyObject* b, Placed* known) const;
  // True for a tensor whose values are the negatives of its memory; a view does not show it.
  bool is_negative(PyObject* object) const;
  // True for tensors of the known types that lie in memory as their strides say and that the kernels take as they are:
  // real floats of the formats, on one device and of one shape, and not empty.
  bool alike(const py::list& tensors) const;
  // The parameters of these groups that need no other look: alike with their gradient and their states, of which there
  // are these and no others; wrappers must be placed alike. groups: tuples of the list of parameters, the names of
  // states and of states of one number, and whether the latter are on the parameter's device; None for the names where
  // every parameter must be looked at. Returns for each parameter its device, or None. What a step writes of them is
  // added to `written`, of wrappers the plain tensor, and to `owners` the number of the parameter and the name of the
  // state, which is empty for the parameter itself.
  py::list ready(const py::list& groups, const py::dict& inputs, const py::dict& state, py::list written,
                 py::list owners) const;
  bool uses_exchange() const { return api_ != nullptr; }

 private:
  // What tensors that are alike share.
  struct Alike {
    int device = kOtherDevice;
    std::vector<int64_t> shape;
  };
  // Where a type of wrappers has its slots, from the start of an object; 0 without them.
  struct Slots {
    PyTypeObject* type;
    Py_ssize_t local = 0, spec = 0;
  };
  bool is_plain_type(PyObject* object) const;
  PyObject* plain_of(PyObject* object) const;
  const Slots& slots_of(PyTypeObject* type) const;
  bool read_plain(PyObject* object, View* view) const;
  bool joins(PyObject* object, View* view, Alike* alike) const;
  bool is_ready(py::handle param, const py::dict& inputs, PyObject* state, const py::tuple& names,
                const py::tuple& numbers, bool beside, Alike* alike) const;
  void read_exchange(PyObject* object, View* view) const;
  void read_methods(PyObject* object, View* view) const;

  py::tuple tensor_types_;
  std::vector<PyTypeObject*> types_;  // the same, for five comparisons per parameter and step
  py::object slots_of_, local_;
  mutable std::vector<Slots> slots_;  // of one or two types
  py::str placements_name_{"placements"}, mesh_name_{"mesh"};
  const dlpack::ExchangeApi* api_ = nullptr;
};

}  // namespace precond
