// Reading tensors; see reader.h.
#include "python/reader.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <string>

#include "plan/layout.h"

namespace precond {
namespace {

// By the names torch gives its dtypes.
Storage storage_of(const std::string& dtype) {
  if (dtype == "torch.float32" || dtype == "torch.complex64") return Storage::fp32;
  if (dtype == "torch.bfloat16") return Storage::bf16;
  if (dtype == "torch.float16") return Storage::fp16;
  if (dtype == "torch.int8") return Storage::int8;
  if (dtype == "torch.uint8") return Storage::uint8;
  if (dtype == "torch.float64") return Storage::fp64;
  if (dtype == "torch.int32") return Storage::int32;
  if (dtype == "torch.int64") return Storage::int64;
  return Storage::none;
}

// By DLPack's codes; complex64 is two floats of 32 bits.
Storage storage_of(const dlpack::DLTensor& t) {
  if (t.lanes != 1) return Storage::none;
  switch (t.code << 8 | t.bits) {
    case dlpack::kFloat << 8 | 32:
    case dlpack::kComplex << 8 | 64:
      return Storage::fp32;
    case dlpack::kBfloat << 8 | 16:
      return Storage::bf16;
    case dlpack::kFloat << 8 | 16:
      return Storage::fp16;
    case dlpack::kInt << 8 | 8:
      return Storage::int8;
    case dlpack::kUint << 8 | 8:
      return Storage::uint8;
    case dlpack::kFloat << 8 | 64:
      return Storage::fp64;
    case dlpack::kInt << 8 | 32:
      return Storage::int32;
    case dlpack::kInt << 8 | 64:
      return Storage::int64;
    default:
      return Storage::none;
  }
}

// A complex tensor as the real one with a last dimension of two. Its shape and strides are copied.
void view_as_real(View* view) {
  std::vector<int64_t> dims(view->shape, view->shape + view->ndim);
  dims.push_back(2);
  for (int d = 0; d < view->ndim; ++d) dims.push_back(2 * view->strides[d]);
  dims.push_back(1);
  view->owned = std::move(dims);
  view->ndim += 1;
  view->itemsize /= 2;
  view->complex = true;
  view->shape = view->owned.data();
  view->strides = view->shape + view->ndim;
}

// Where an object has a slot that its type describes; 0 where the description is of something else.
Py_ssize_t offset_of(const py::object& member) {
  if (Py_TYPE(member.ptr()) != &PyMemberDescr_Type) return 0;
  const PyMemberDef& slot = *reinterpret_cast<PyMemberDescrObject*>(member.ptr())->d_member;
  return slot.type == T_OBJECT_EX ? slot.offset : 0;
}

// What is in a slot, or null. Through the attribute it would take ten times as long.
PyObject* slot(PyObject* object, Py_ssize_t offset) {
  return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

// A lazy conjugate has the memory of its opposite.
bool is_conjugate(PyObject* object) { return py::handle(object).attr("is_conj")().cast<bool>(); }

}  // namespace

Reader::Reader(py::tuple tensor_types, py::object slots_of, py::object local, bool use_exchange)
    : tensor_types_(std::move(tensor_types)), slots_of_(std::move(slots_of)), local_(std::move(local)) {
  for (const py::handle type : tensor_types_) types_.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  const py::handle tensor_type = tensor_types_[0];
  if (!use_exchange || !py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major > 1) api = api->previous;
  api_ = api;
}

bool Reader::is_plain_type(PyObject* object) const {
  return std::find(types_.begin(), types_.end(), Py_TYPE(object)) != types_.end();
}

const Reader::Slots& Reader::slots_of(PyTypeObject* type) const {
  for (const Slots& slots : slots_)
    if (slots.type == type) return slots;
  Slots found{type};
  const py::handle kind(reinterpret_cast<PyObject*>(type));
  const py::object names = slots_of_(kind);
  if (!names.is_none()) {
    const auto [local, spec] = names.cast<std::pair<py::str, py::str>>();
    const py::object members = kind.attr("__dict__");
    found.local = offset_of(members[local]);
    found.spec = offset_of(members[spec]);
    if (found.local == 0 || found.spec == 0) found = {type};
  }
  return slots_.emplace_back(found);
}

bool Reader::placed_alike(PyObject* a, PyObject* b, Placed* known) const {
  if (is_plain_type(a) || Py_TYPE(a) != Py_TYPE(b)) return true;
  const Py_ssize_t spec = slots_of(Py_TYPE(a)).spec;
  if (spec == 0) return true;
  const py::handle of_a = slot(a, spec), of_b = slot(b, spec);
  if (of_a.is(of_b) || !of_a || !of_b || (known->a.is(of_a) && known->b.is(of_b))) return true;
  for (const py::str& name : {placements_name_, mesh_name_})
    if (!of_a.attr(name).equal(of_b.attr(name))) return false;
  *known = {py::reinterpret_borrow<py::object>(of_a), py::reinterpret_borrow<py::object>(of_b)};
  return true;
}

void Reader::read(PyObject* object, View* view) const {
  view->plain = {};
  if (!is_plain_type(object)) {
    PyObject* const held = plain_of(object);
    view->plain = held != nullptr ? py::reinterpret_borrow<py::object>(held) : local_(py::handle(object));
    object = view->plain.ptr();
  }
  if (api_ != nullptr)
    read_exchange(object, view);
  else
    read_methods(object, view);
}

StateOf states_by_param(const py::dict& state) {
  StateOf found;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) found[key] = py::reinterpret_borrow<py::object>(value);
  return found;
}

// A tensor of the known types: the object, or what a wrapper has in its slot. Null: neither.
PyObject* Reader::plain_of(PyObject* object) const {
  if (is_plain_type(object)) return object;
  const Py_ssize_t local = slots_of(Py_TYPE(object)).local;
  PyObject* const held = local == 0 ? nullptr : slot(object, local);
  return held != nullptr && is_plain_type(held) ? held : nullptr;
}

// False where the memory of a tensor of the known types does not show its values.
bool Reader::read_plain(PyObject* object, View* view) const {
  try {
    PyObject* const plain = plain_of(object);
    if (plain == nullptr) return false;
    read(plain, view);
    return !is_negative(plain);
  } catch (const py::error_already_set&) {
    return false;
  }
}

bool Reader::joins(PyObject* object, View* view, Alike* alike) const {
  if (!read_plain(object, view)) return false;
  if (!is_value(view->storage) || view->complex || view->data == nullptr || view->ndim > kMaxDims) return false;
  if (alike->device == kOtherDevice) {
    alike->shape.assign(view->shape, view->shape + view->ndim);
    alike->device = view->device;
    return alike->device != kOtherDevice;
  }
  return view->device == alike->device &&
         std::equal(view->shape, view->shape + view->ndim, alike->shape.begin(), alike->shape.end());
}

bool Reader::alike(const py::list& tensors) const {
  View view;
  Alike alike;
  for (const py::handle tensor : tensors)
    if (!is_plain_type(tensor.ptr()) || !joins(tensor.ptr(), &view, &alike)) return false;
  return true;
}

py::list Reader::ready(const py::list& groups, const py::dict& inputs, const py::dict& state, py::list written,
                       py::list owners) const {
  const StateOf state_of = states_by_param(state);
  py::list devices;
  const py::str whole("");
  for (const py::handle item : groups) {
    const auto group = item.cast<py::tuple>();
    const auto params = group[0].cast<py::list>();
    if (group[1].is_none()) {
      for (size_t i = 0; i < params.size(); ++i) devices.append(py::none());
      continue;
    }
    const auto names = group[1].cast<py::tuple>(), numbers = group[2].cast<py::tuple>();
    const bool beside = group[3].cast<bool>();
    for (const py::handle param : params) {
      const py::int_ number(devices.size());
      Alike alike;
      const auto found = state_of.find(param.ptr());
      PyObject* const held = found == state_of.end() ? nullptr : found->second.ptr();
      if (!is_ready(param, inputs, held, names, numbers, beside, &alike)) {
        devices.append(py::none());
        continue;
      }
      devices.append(alike.device);
      const auto add = [&](const py::handle tensor, const py::handle name) {
        written.append(py::handle(plain_of(tensor.ptr())));
        owners.append(py::make_tuple(number, name));
      };
      add(param, whole);
      for (const py::handle name : names) add(PyDict_GetItem(held, name.ptr()), name);
      if (beside && alike.device >= 0)
        for (const py::handle name : numbers) add(PyDict_GetItem(held, name.ptr()), name);
    }
  }
  return devices;
}

bool Reader::is_ready(py::handle param, const py::dict& inputs, PyObject* state, const py::tuple& names,
                      const py::tuple& numbers, bool beside, Alike* alike) const {
  View view;
  if (!joins(param.ptr(), &view, alike) || param.attr("is_inference")().cast<bool>()) return false;
  Placed placed;
  const auto like_param = [&](PyObject* tensor) {
    return is_plain_type(param.ptr()) == is_plain_type(tensor) && joins(tensor, &view, alike) &&
           placed_alike(param.ptr(), tensor, &placed);
  };
  PyObject* const given = inputs.empty() ? nullptr : PyDict_GetItemWithError(inputs.ptr(), param.ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  const py::object gradient = given == nullptr ? param.attr("grad") : py::reinterpret_borrow<py::object>(given);
  if (!gradient.is_none() && !like_param(gradient.ptr())) return false;
  // What else stands there must be looked at.
  const Py_ssize_t size = state == nullptr ? 0 : PyDict_Check(state) ? PyDict_GET_SIZE(state) : -1;
  if (size != Py_ssize_t(names.size() + numbers.size())) return false;
  for (const py::handle name : names) {
    PyObject* const value = PyDict_GetItemWithError(state, name.ptr());
    if (value == nullptr || !like_param(value)) return false;
  }
  for (const py::handle name : numbers) {
    PyObject* const value = PyDict_GetItemWithError(state, name.ptr());
    if (value == nullptr || !is_plain_type(value) || !read_plain(value, &view)) return false;
    if (view.device != (beside ? alike->device : kCpuDevice)) return false;
    if (view.storage != Storage::fp32 && view.storage != Storage::fp64) return false;
    if (!is_one_element(view)) return false;
  }
  return true;
}

bool Reader::is_negative(PyObject* object) const { return py::handle(object).attr("is_neg")().cast<bool>(); }

void Reader::read_exchange(PyObject* object, View* view) const {
  dlpack::DLTensor t;
  if (api_->view_from_object(object, &t) != 0) throw py::error_already_set();
  view->data = static_cast<char*>(t.data) + t.byte_offset;
  view->itemsize = (t.bits + 7) / 8 * t.lanes;
  view->ndim = t.ndim;
  view->shape = t.shape;
  view->strides = t.strides;
  const bool complex64 = t.code == dlpack::kComplex && t.bits == 64;
  view->complex = false;
  view->storage = complex64 && is_conjugate(object) ? Storage::none : storage_of(t);
  view->device = t.device_type == dlpack::kCpu    ? kCpuDevice
                 : t.device_type == dlpack::kCuda ? t.device_id
                                                  : kOtherDevice;
  if (complex64) view_as_real(view);
}

void Reader::read_methods(PyObject* object, View* view) const {
  const py::handle t(object);
  const std::string dtype = py::str(t.attr("dtype"));
  const bool complex64 = dtype == "torch.complex64";
  view->complex = false;
  view->storage = complex64 && is_conjugate(object) ? Storage::none : storage_of(dtype);
  view->device = t.attr("is_cpu").cast<bool>()    ? kCpuDevice
                 : t.attr("is_cuda").cast<bool>() ? t.attr("device").attr("index").cast<int>()
                                                  : kOtherDevice;
  view->itemsize = t.attr("element_size")().cast<int>();
  view->data = reinterpret_cast<char*>(t.attr("data_ptr")().cast<uintptr_t>());
  const auto shape = t.attr("shape").cast<py::tuple>();
  const auto strides = t.attr("stride")().cast<py::tuple>();
  view->ndim = int(shape.size());
  view->owned.clear();
  for (const auto& list : {shape, strides})
    for (const py::handle n : list) view->owned.push_back(n.cast<int64_t>());
  view->shape = view->owned.data();
  view->strides = view->shape + view->ndim;
  if (complex64) view_as_real(view);
}

}  // namespace precond
