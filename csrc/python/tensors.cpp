// Keeping a plan true; see tensors.h.
#include "python/tensors.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

#include "base/denormals.h"
#include "cpu/norm.h"
#include "cpu/update.h"
#include "rules/registry.h"

namespace precond {
namespace {

// How many entries ahead to prefetch.
constexpr size_t kAhead = 3;

Format plain_format(Storage storage) {
  return storage == Storage::bf16 ? Format::bf16 : storage == Storage::fp16 ? Format::fp16 : Format::fp32;
}

Storage storage_of(Format format) { return info_of(format).storage; }
// Of what lies in a state beside a parameter or a state. Remainders of 16 bits lie in two int8, since NCCL and gloo
// gather no int16.
int64_t remainder_bytes(Format format, int64_t numel) { return numel * (remainder_bits(format) / 8); }
int64_t code_bytes(Format format, int64_t numel) { return (numel * item_bits(format) + 7) / 8; }

bool same_dims(const int64_t* a, const int64_t* b, int n) {
  for (int d = 0; d < n; ++d)
    if (a[d] != b[d]) return false;
  return true;
}

}  // namespace

TensorPlan::TensorPlan(const Reader& reader, const std::map<int, std::vector<std::string>>& state_names,
                       const std::string& step_name, int64_t chunk, int device)
    : reader_(reader), state_names_(rules().size()), scale_names_(rules().size()), plan_(chunk), device_(device) {
#if defined(PRECOND_CUDA)
  if (device_ >= 0) cuda_ = std::make_unique<CudaExecutor>(device_);
#if defined(PRECOND_CUDA_ON_HOST)
  device_ = kCpuDevice;
#endif
#else
  if (device_ >= 0) throw std::invalid_argument("this extension was built without CUDA");
#endif
  const auto intern = [](const std::string& s) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(s.c_str()));
  };
  for (const auto& [rule, names] : state_names) {
    for (const std::string& name : names) {
      state_names_.at(size_t(rule)).push_back(intern(name));
      scale_names_.at(size_t(rule)).push_back(intern(name + "_scale"));
    }
  }
  remainder_name_ = intern("remainder");
  key_name_ = intern("key");
  if (!step_name.empty()) step_name_ = intern(step_name);
  params_name_ = intern("params");
  grad_name_ = intern("grad");
}

// The lines that reading a tensor touches, in the order of the look-ups.
void TensorPlan::Trace::prefetch() const {
  const char* o = static_cast<const char*>(object);
  const char* s = static_cast<const char*>(shape);
  __builtin_prefetch(o);
  __builtin_prefetch(o + 24);
  __builtin_prefetch(s - 64);
  __builtin_prefetch(s);
  __builtin_prefetch(s + 64);
  __builtin_prefetch(storage);
  __builtin_prefetch(static_cast<const char*>(storage) + 59);
}

TensorPlan::Trace TensorPlan::trace(py::handle tensor, const View& view) const {
  Trace trace{tensor.ptr(), view.shape, nullptr};
  try {
    trace.storage = reinterpret_cast<const void*>(tensor.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>());
  } catch (py::error_already_set&) {
    // A tensor without such a storage is only read more slowly.
  }
  return trace;
}

bool TensorPlan::same_shape(const Entry& entry, const View& view) const {
  return view.ndim == entry.ndim && same_dims(view.shape, &dims_[entry.dims], entry.ndim);
}

// What a plan can update. Tensors without memory of their own (fake, meta, lazy zeros) have no address.
bool TensorPlan::fits(const View& view) const {
  const bool known = view.storage == Storage::fp32 || view.storage == Storage::bf16 || view.storage == Storage::fp16;
  if (!known || view.device != device_) return false;
  if (view.data != nullptr) return true;
  for (int d = 0; d < view.ndim; ++d)
    if (view.shape[d] == 0) return true;
  return false;
}

bool TensorPlan::is_counter(const View& view, bool on_device) const {
  return view.device == (on_device ? device_ : kCpuDevice) && view.storage == Storage::fp32 && view.ndim == 0 &&
         view.data != nullptr;
}

bool TensorPlan::same_strides(const Entry& entry, const View& view) const {
  return same_dims(view.strides, &dims_[entry.dims] + entry.ndim, entry.ndim);
}

Order TensorPlan::order_of(const Entry& entry) const {
  const int64_t* dims = &dims_[entry.dims];
  return entry.logical ? logical_order(dims, entry.ndim) : storage_order(dims, dims + entry.ndim, entry.ndim);
}

// True for codes, scales or a remainder: so many elements in one stretch, in the order of the indices.
bool TensorPlan::is_beside(const View& view, Storage storage, int64_t count) const {
  if (view.storage != storage || view.device != device_) return false;
  int64_t numel = 1;
  for (int d = 0; d < view.ndim; ++d) numel *= view.shape[d];
  return numel == count && (count == 0 || is_dense(logical_order(view.shape, view.ndim), view.shape, view.strides));
}

// Where `view` keeps its elements. slot: the strides that may be overwritten, or kDense to add new ones.
Operand TensorPlan::place(const Entry& entry, const View& view, Format format, int32_t* slot, const char* what) {
  Operand operand;
  operand.data = view.data;
  operand.format = format;
  if (storage_of(format) != view.storage)
    throw py::type_error(std::string(what) + " must have the dtype of its format");
  const Order order = order_of(entry);
  if (is_dense(order, view.shape, view.strides)) return operand;
  Strides strides;
  if (!make_strides(order, view.shape, view.strides, &strides))
    throw py::value_error(std::string(what) + " must have at most " + std::to_string(kMaxDims) +
                          " dimensions that cannot be merged");
  if (*slot == kDense)
    *slot = plan_.add_strides(strides);
  else
    plan_.strides(*slot) = strides;
  operand.strides = *slot;
  return operand;
}

void TensorPlan::add(py::handle param, py::handle state, int group, int rule, bool fresh, bool counts,
                     bool step_on_device, const std::vector<int>& formats, bool draws,
                     const std::array<int64_t, 3>& place_of) {
  View view;
  reader_.read(param.ptr(), &view);
  if (!fits(view))
    throw py::type_error("a parameter must be float32, bfloat16, float16 or complex64 on the plan's device");
  if (view.ndim > 64) throw py::value_error("a parameter must have at most 64 dimensions");
  Entry entry;
  entry.param = param.ptr();
  entry.kind = Kind::kUpdated;
  entry.group = group;
  entry.ndim = view.ndim;
  entry.dims = int64_t(dims_.size());
  dims_.insert(dims_.end(), view.shape, view.shape + view.ndim);
  dims_.insert(dims_.end(), view.strides, view.strides + view.ndim);

  Tensor tensor;
  tensor.group = group;
  tensor.rule = rule;
  tensor.fresh = fresh;
  tensor.numel = 1;
  for (int d = 0; d < view.ndim; ++d) tensor.numel *= view.shape[d];
  int32_t slot = kDense;
  const auto format_of = [&](size_t operand) {
    return formats.empty() ? plain_format(view.storage) : Format(formats.at(operand));
  };
  for (const int format : formats) entry.logical = entry.logical || !is_plain(Format(format));
  tensor.p = place(entry, view, format_of(0), &slot, "a parameter");
  Traces traces;
  traces.p = trace(param, view);
  const std::vector<py::object>& names = state_names_[size_t(rule)];
  if (int(names.size()) != rules()[rule].states)
    throw py::value_error("a rule must have a name for each of its states");
  for (size_t k = 0; k < names.size(); ++k) {
    reader_.read(state[names[k]].ptr(), &view);
    traces.state[k] = trace(state[names[k]], view);
    if (is_coded(format_of(1 + k))) {
      tensor.state[k].format = format_of(1 + k);
      tensor.state[k].data = view.data;
      if (!is_beside(view, storage_of(tensor.state[k].format), code_bytes(tensor.state[k].format, tensor.numel)))
        throw py::type_error("state " + py::str(names[k]).cast<std::string>() + " must be the codes of its format");
      continue;
    }
    if (!fits(view) || !same_shape(entry, view))
      throw py::type_error(
          "state " + py::str(names[k]).cast<std::string>() +
          " must be float32, bfloat16, float16 or complex64 on the plan's device, and of its parameter's shape");
    slot = kDense;
    tensor.state[k] = place(entry, view, format_of(1 + k), &slot, "a state");
  }
  tensor.draws = draws;
  if (draws) tensor.key = state[key_name_].cast<uint64_t>();
  tensor.place = {place_of[0], place_of[1], place_of[2]};
  if (has_remainder(tensor.p.format)) {
    reader_.read(state[remainder_name_].ptr(), &view);
    if (!is_beside(view, Storage::int8, remainder_bytes(tensor.p.format, tensor.numel)))
      throw py::type_error("state remainder must be that of the parameter's format");
    tensor.p.beside = view.data;
  }
  for (size_t k = 0; k < names.size(); ++k) {
    if (!is_coded(tensor.state[k].format)) continue;
    reader_.read(state[scale_names_[size_t(rule)][k]].ptr(), &view);
    if (!is_beside(view, Storage::bf16, (tensor.numel + kGroup - 1) / kGroup))
      throw py::type_error("state " + py::str(scale_names_[size_t(rule)][k]).cast<std::string>() +
                           " must have a bfloat16 for each group");
    tensor.state[k].beside = view.data;
  }
  if (counts) {
    reader_.read(state[step_name_].ptr(), &view);
    if (!is_counter(view, step_on_device))
      throw py::type_error("state step must be a float32 tensor without dimensions");
    tensor.step = reinterpret_cast<float*>(view.data);
    tensor.step_on_device = step_on_device;
    traces.state[kMaxStates] = trace(state[step_name_], view);
  }
  entry.tensor = plan_.add(tensor);
  entries_.push_back(entry);
  traces_.push_back(traces);
}

void TensorPlan::defer(py::handle param, int group) {
  entries_.emplace_back();
  traces_.emplace_back();
  entries_.back().param = param.ptr();
  entries_.back().group = group;
  entries_.back().kind = Kind::kDeferred;
}

void TensorPlan::ignore(py::handle param, int group) {
  defer(param, group);
  entries_.back().kind = Kind::kIgnored;
}

void TensorPlan::seal(const py::dict& state) {
  std::unordered_map<PyObject*, int32_t> entry_of;
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].kind == Kind::kUpdated) entry_of[entries_[i].param] = int32_t(i);
  state_items_.clear();
  for (const auto& item : state) {
    const auto found = entry_of.find(item.first.ptr());
    state_items_.emplace_back(item.first.ptr(), found == entry_of.end() ? -1 : found->second);
  }
}

bool TensorPlan::same_place(const Operand& operand, const Entry& entry, const View& view) const {
  if (!fits(view) || view.data != operand.data || view.storage != storage_of(operand.format) ||
      !same_shape(entry, view))
    return false;
  if (operand.strides == kDense && same_strides(entry, view)) return true;
  const Order order = order_of(entry);
  if (operand.strides == kDense) return is_dense(order, view.shape, view.strides);
  Strides strides;
  const Strides& known = plan_.strides(operand.strides);
  return make_strides(order, view.shape, view.strides, &strides) && strides.ndim == known.ndim &&
         same_dims(strides.stride, known.stride, known.ndim);
}

bool TensorPlan::same_state(const Entry& entry, PyObject* param_state, View* view) {
  const Tensor& tensor = plan_.tensor(entry.tensor);
  if (!PyDict_Check(param_state)) return false;
  const std::vector<py::object>& names = state_names_[size_t(tensor.rule)];
  for (size_t k = 0; k < names.size(); ++k) {
    PyObject* value = PyDict_GetItemWithError(param_state, names[k].ptr());
    if (value == nullptr) return false;
    reader_.read(value, view);
    const Operand& operand = tensor.state[k];
    if (is_coded(operand.format) ? view->data != operand.data || !is_beside(*view, storage_of(operand.format),
                                                                            code_bytes(operand.format, tensor.numel))
                                 : !same_place(operand, entry, *view))
      return false;
  }
  if (entry.logical && !same_special(tensor, param_state, view)) return false;
  if (tensor.step == nullptr) return true;
  PyObject* value = PyDict_GetItemWithError(param_state, step_name_.ptr());
  if (value == nullptr) return false;
  reader_.read(value, view);
  return is_counter(*view, tensor.step_on_device) && view->data == reinterpret_cast<char*>(tensor.step);
}

// Scales, remainder and key.
bool TensorPlan::same_special(const Tensor& tensor, PyObject* param_state, View* view) {
  const auto same = [&](const py::object& name, Storage storage, int64_t count, const char* data) {
    PyObject* value = PyDict_GetItemWithError(param_state, name.ptr());
    if (value == nullptr) return false;
    reader_.read(value, view);
    return view->data == data && is_beside(*view, storage, count);
  };
  const std::vector<py::object>& scales = scale_names_[size_t(tensor.rule)];
  for (size_t k = 0; k < scales.size(); ++k)
    if (is_coded(tensor.state[k].format) &&
        !same(scales[k], Storage::bf16, (tensor.numel + kGroup - 1) / kGroup, tensor.state[k].beside))
      return false;
  if (has_remainder(tensor.p.format) &&
      !same(remainder_name_, Storage::int8, remainder_bytes(tensor.p.format, tensor.numel), tensor.p.beside))
    return false;
  if (!tensor.draws) return true;
  PyObject* key = PyDict_GetItemWithError(param_state, key_name_.ptr());
  return key != nullptr && py::handle(key).cast<uint64_t>() == tensor.key;
}

py::object TensorPlan::gradient_of(PyObject* param, const py::dict& inputs) const {
  if (!inputs.empty()) {
    PyObject* input = PyDict_GetItemWithError(inputs.ptr(), param);
    if (input != nullptr) return py::reinterpret_borrow<py::object>(input);
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  auto gradient = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, grad_name_.ptr()));
  if (!gradient) throw py::error_already_set();
  return gradient;
}

bool TensorPlan::refresh(const py::list& param_groups, const py::dict& state, const py::dict& inputs,
                         const py::list& rows) {
  rows_.clear();
  overrides_.clear();
  held_.clear();
  held_.reserve(2 * entries_.size());
  for (const py::handle item : rows) {
    const py::tuple fields = py::reinterpret_borrow<py::tuple>(item);
    GroupRow row;
    row.rule = fields[0].cast<int32_t>();
    row.sign = fields[1].cast<float>();
    const py::tuple hyper = fields[2];
    for (size_t k = 0; k < hyper.size(); ++k) row.hyper[k] = hyper[k].cast<double>();
    for (const py::handle o : py::list(fields[3])) {
      const py::tuple override = py::reinterpret_borrow<py::tuple>(o);
      overrides_.push_back({reinterpret_cast<const void*>(override[1].cast<uintptr_t>()), int32_t(rows_.size()),
                            override[0].cast<int32_t>(), override[2].cast<int32_t>()});
    }
    rows_.push_back(row);
  }
  try {
    return refresh_gradients(param_groups, inputs) && refresh_states(state);
  } catch (const std::exception&) {
    // Something is there that cannot be read (a sparse gradient, None for a state): whoever builds the next plan checks
    // everything and says what it is.
    return false;
  }
}

bool TensorPlan::refresh_gradients(const py::list& param_groups, const py::dict& inputs) {
  View view;
  size_t next = 0;
  for (size_t g = 0; g < param_groups.size(); ++g) {
    const py::list params = param_groups[g][params_name_];
    for (const py::handle param : params) {
      if (next == entries_.size() || entries_[next].param != param.ptr()) return false;
      if (next + kAhead < traces_.size()) {
        traces_[next + kAhead].p.prefetch();
        traces_[next + kAhead].g.prefetch();
      }
      Trace& g_trace = traces_[next].g;
      Entry& entry = entries_[next++];
      if (entry.group != int32_t(g)) return false;
      if (entry.kind == Kind::kIgnored) continue;
      py::object gradient = gradient_of(param.ptr(), inputs);
      if (entry.kind == Kind::kDeferred) {
        if (!gradient.is_none()) return false;
        continue;
      }
      Tensor& tensor = plan_.tensor(entry.tensor);
      if (tensor.rule != rows_[g].rule) return false;
      tensor.active = !gradient.is_none();
      if (!tensor.active) continue;
      reader_.read(param.ptr(), &view);
      if (!same_place(tensor.p, entry, view) || !same_strides(entry, view)) return false;
      reader_.read(gradient.ptr(), &view);
      if (!fits(view) || !same_shape(entry, view)) return false;
      // A gradient that stays from step to step is worth a look at its storage, once; a new one is in the cache anyway.
      if (g_trace.object != gradient.ptr()) {
        if (reader_.is_negative(gradient.ptr())) return false;
        g_trace = {gradient.ptr(), view.shape, nullptr};
      } else if (g_trace.storage == nullptr) {
        g_trace = trace(gradient, view);
      }
      if (tensor.p.strides == kDense && same_strides(entry, view))
        tensor.g = {view.data, plain_format(view.storage), kDense, nullptr};
      else
        tensor.g = place(entry, view, plain_format(view.storage), &entry.g_slot, "a gradient");
      held_.push_back(std::move(gradient));
    }
  }
  return next == entries_.size();
}

bool TensorPlan::refresh_states(const py::dict& state) {
  View view;
  // In the dictionary's own order: walking it is five times quicker than one look-up per parameter, because
  // a tensor's hash is a Python function.
  size_t item = 0;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    if (item == state_items_.size() || state_items_[item].first != key) return false;
    const int32_t index = state_items_[item++].second;
    if (item + kAhead < state_items_.size() && state_items_[item + kAhead].second >= 0) {
      const Traces& ahead = traces_[state_items_[item + kAhead].second];
      for (const Trace& trace : ahead.state)
        if (trace.object != nullptr) trace.prefetch();
    }
    if (index < 0 || !plan_.tensor(entries_[index].tensor).active) continue;
    if (!same_state(entries_[index], value, &view)) return false;
    held_.push_back(py::reinterpret_borrow<py::object>(value));
  }
  return item == state_items_.size();
}

py::list TensorPlan::updated() {
  held_.clear();
  py::list list;
  for (const Entry& entry : entries_)
    if (entry.kind == Kind::kUpdated && plan_.tensor(entry.tensor).active) list.append(py::handle(entry.param));
  return list;
}

void TensorPlan::set_norm_classes(const std::vector<int>& classes) {
  for (size_t i = 0; i < classes.size(); ++i) plan_.tensor(int64_t(i)).norm_class = classes[i];
}

void TensorPlan::norm(const Clip& clip, int threads) {
  const py::gil_scoped_release release;
  measure_on_cpu(plan_, clip, threads);
}

py::list TensorPlan::run(float grad_coef, float clip_value, const Clip& clip, int threads) {
  Control control{grad_coef, 0.0f, clip_value};
  {
    const py::gil_scoped_release release;
    if (clip.measure) measure_on_cpu(plan_, clip, threads);
    {
      const IeeeDenormals ieee;
      finish(clip, &control);
    }
    skipped_ = control.skip != 0.0f;
    if (!skipped_) run_on_cpu(&plan_, rows_, control, threads);
  }
  if (skipped_) return held_.clear(), py::list();
  return updated();
}

#if defined(PRECOND_CUDA)
void TensorPlan::norm_cuda(const Clip& clip, uintptr_t stream) {
  DeviceStep step;
  step.clip = clip;
  step.stream = stream;
  const py::gil_scoped_release release;
  cuda_->norm(plan_, rows_, step);
}
py::list TensorPlan::run_cuda(float grad_coef, float clip_value, const Clip& clip, uintptr_t grad_scale,
                              uintptr_t found_inf, uintptr_t stream) {
  DeviceStep step;
  step.clip = clip;
  step.clip_value = clip_value;
  step.overrides = overrides_;
  step.grad_coef = grad_coef;
  step.grad_scale = reinterpret_cast<const float*>(grad_scale);
  step.found_inf = reinterpret_cast<const float*>(found_inf);
  step.stream = stream;
  {
    const py::gil_scoped_release release;
    cuda_->run(&plan_, rows_, step);
  }
  return updated();
}
int TensorPlan::launches() const { return cuda_ ? cuda_->launches() : 1; }
bool TensorPlan::was_captured() const { return cuda_ && cuda_->was_captured(); }
#else
void TensorPlan::norm_cuda(const Clip&, uintptr_t) {
  throw std::invalid_argument("this extension was built without CUDA");
}
py::list TensorPlan::run_cuda(float, float, const Clip&, uintptr_t, uintptr_t, uintptr_t) {
  throw std::invalid_argument("this extension was built without CUDA");
}
int TensorPlan::launches() const { return 1; }
bool TensorPlan::was_captured() const { return false; }
#endif

}  // namespace precond
