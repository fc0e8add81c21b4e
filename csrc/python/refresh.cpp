// Making a plan that of the coming step; see tensors.h.
#include "python/tensors.h"

namespace precond {
namespace {

// How many entries ahead to prefetch.
constexpr size_t kAhead = 3;

bool same_dims(const int64_t* a, const int64_t* b, int n) {
  for (int d = 0; d < n; ++d)
    if (a[d] != b[d]) return false;
  return true;
}

}  // namespace

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
  __builtin_prefetch(wrapper);
  __builtin_prefetch(static_cast<const char*>(wrapper) + 64);
}

bool TensorPlan::same_shape(const Entry& entry, const View& view) const {
  return view.ndim == entry.ndim && same_dims(view.shape, &dims_[entry.dims], entry.ndim);
}

bool TensorPlan::same_strides(const Entry& entry, const View& view) const {
  return same_dims(view.strides, &dims_[entry.dims] + entry.ndim, entry.ndim);
}

bool TensorPlan::same_operand(const Operand& operand, const Entry& entry, const View& view) const {
  if (!fits(view) || view.data != operand.data || view.storage != info_of(operand.format).storage ||
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

bool TensorPlan::same_state(const Entry& entry, PyObject* param_state, View* view, Traces* traces) {
  const Tensor& tensor = plan_.tensor(entry.tensor);
  if (!PyDict_Check(param_state)) return false;
  const std::vector<py::object>& names = state_names_[size_t(tensor.rule)];
  for (size_t k = 0; k < names.size(); ++k) {
    PyObject* value = PyDict_GetItemWithError(param_state, names[k].ptr());
    if (value == nullptr) return false;
    reader_.read(value, view);
    if (traces->refreshed == 2) traces->state[k] = trace(value, *view);
    const Operand& operand = tensor.state[k];
    const bool same = is_coded(operand.format)
                          ? view->data == operand.data && is_codes(*view, operand.format, tensor.numel)
                          : same_operand(operand, entry, *view);
    if (!same) return false;
  }
  if (entry.logical && !same_special(tensor, param_state, view)) return false;
  const bool tracing = traces->refreshed == 2;
  return same_number(tensor.step, step_name_, tensor.step_on_device, param_state, view,
                     tracing ? &traces->step : nullptr) &&
         same_number(tensor.scalar, scalar_names_[size_t(tensor.rule)], tensor.step_on_device, param_state, view,
                     tracing ? &traces->scalar : nullptr);
}

// The step counter, or a scalar state.
bool TensorPlan::same_number(const Number& number, const py::object& name, bool on_device, PyObject* param_state,
                             View* view, Trace* trace_of) const {
  if (!number) return true;
  PyObject* value = PyDict_GetItemWithError(param_state, name.ptr());
  if (value == nullptr) return false;
  reader_.read(value, view);
  if (trace_of != nullptr) *trace_of = trace(value, *view);
  const Number found = number_of(*view, on_device);
  return found.data == number.data && found.type == number.type;
}

// Scales, remainder and key.
bool TensorPlan::same_special(const Tensor& tensor, PyObject* param_state, View* view) {
  const auto read = [&](const py::object& name, const char* data) {
    PyObject* value = PyDict_GetItemWithError(param_state, name.ptr());
    if (value == nullptr) return false;
    reader_.read(value, view);
    return view->data == data;
  };
  const std::vector<py::object>& scales = scale_names_[size_t(tensor.rule)];
  for (size_t k = 0; k < scales.size(); ++k)
    if (is_coded(tensor.state[k].format) &&
        !(read(scales[k], tensor.state[k].beside) && is_scales(*view, tensor.numel)))
      return false;
  if (has_remainder(tensor.p.format) &&
      !(read(remainder_name_, tensor.p.beside) && is_remainder(*view, tensor.p.format, tensor.numel)))
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
  newcomers_.clear();
  has_gradients_ = false;
  held_.clear();
  held_.reserve(2 * entries_.size());
  for (const py::handle item : rows) {
    const Request& request = item.cast<const Request&>();
    for (Override override : request.overrides) {
      override.group = int32_t(rows_.size());
      overrides_.push_back(override);
    }
    rows_.push_back(request.row);
  }
  try {
    if (complete_ && refresh_gradients(param_groups, inputs)) return newcomers_.empty() && refresh_states(state);
  } catch (const std::exception&) {
    // Something is there that cannot be read (a sparse gradient, None for a state): whoever builds the next plan checks
    // everything and says what it is.
  }
  newcomers_.clear();
  return false;
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
        if (!gradient.is_none()) newcomers_.push_back(int64_t(next) - 1);
        continue;
      }
      Tensor& tensor = plan_.tensor(entry.tensor);
      if (tensor.rule != rows_[g].rule) return false;
      tensor.active = !gradient.is_none();
      if (!tensor.active) continue;
      has_gradients_ = true;
      reader_.read(param.ptr(), &view);
      int32_t& refreshed = traces_[next - 1].refreshed;
      if (refreshed < 3 && ++refreshed == 2) traces_[next - 1].p = trace(param, view);
      if (!same_operand(tensor.p, entry, view) || !same_strides(entry, view)) return false;
      reader_.read(gradient.ptr(), &view);
      if (!fits(view, gradients_) || !same_shape(entry, view) ||
          !reader_.placed_alike(param.ptr(), gradient.ptr(), &traces_[next - 1].placed))
        return false;
      const py::handle plain = view.read_of(gradient);
      // A gradient that stays from step to step is worth a look at its storage, once; a new one is in the cache anyway.
      if (g_trace.object != plain.ptr()) {
        if (reader_.is_negative(plain.ptr())) return false;
        g_trace = {plain.ptr(), view.shape, nullptr};
      } else if (g_trace.storage == nullptr) {
        g_trace = trace(gradient, view);
      }
      if (tensor.p.strides == kDense && same_strides(entry, view))
        tensor.g = {view.data, plain_format(view.storage), kDense, nullptr};
      else
        tensor.g = operand_of(entry, view, plain_format(view.storage), &entry.g_slot, "a gradient");
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
      for (const Trace* trace :
           {&ahead.state[0], &ahead.state[1], &ahead.state[2], &ahead.state[3], &ahead.step, &ahead.scalar})
        if (trace->object != nullptr) trace->prefetch();
    }
    if (index < 0 || !plan_.tensor(entries_[index].tensor).active) continue;
    if (!same_state(entries_[index], value, &view, &traces_[index])) return false;
    held_.push_back(py::reinterpret_borrow<py::object>(value));
  }
  return item == state_items_.size();
}

}  // namespace precond
