// Reading tensors; see reader.h.
#include "python/reader.h"

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

// A lazy conjugate has the memory of its opposite.
bool is_conjugate(PyObject* object) { return py::handle(object).attr("is_conj")().cast<bool>(); }

}  // namespace

Reader::Reader(py::tuple tensor_types, py::object local, bool use_exchange)
    : tensor_types_(std::move(tensor_types)), local_(std::move(local)) {
  for (const py::handle type : tensor_types_) types_.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  const py::handle tensor_type = tensor_types_[0];
  if (!use_exchange || !py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (api == nullptr) throw py::error_already_set();
  while (api != nullptr && api->major > 1) api = api->previous;
  api_ = api;
}

void Reader::read(PyObject* object, View* view) const {
  const bool known = std::find(types_.begin(), types_.end(), Py_TYPE(object)) != types_.end();
  if (!known) {
    view->plain = local_(py::handle(object));
    object = view->plain.ptr();
  }
  if (api_ != nullptr)
    read_exchange(object, view);
  else
    read_methods(object, view);
}

bool Reader::alike(const py::list& tensors) const {
  View view;
  std::vector<int64_t> shape;
  int device = kOtherDevice;
  bool first = true;
  for (const py::handle tensor : tensors) {
    if (std::find(types_.begin(), types_.end(), Py_TYPE(tensor.ptr())) == types_.end()) return false;
    try {
      read(tensor.ptr(), &view);
      if (is_negative(tensor.ptr())) return false;
    } catch (const py::error_already_set&) {
      return false;
    }
    const bool known = view.storage == Storage::fp32 || view.storage == Storage::bf16 || view.storage == Storage::fp16;
    if (!known || view.complex || view.data == nullptr || view.ndim > kMaxDims) return false;
    if (first) {
      shape.assign(view.shape, view.shape + view.ndim);
      device = view.device;
    }
    first = false;
    if (view.device != device || !std::equal(view.shape, view.shape + view.ndim, shape.begin(), shape.end()))
      return false;
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
