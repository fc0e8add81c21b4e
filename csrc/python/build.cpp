// Describing the optimizer's tensors to a plan; see tensors.h.
#include <stdexcept>

#include "python/tensors.h"
#include "rules/registry.h"

namespace precond {

TensorPlan::TensorPlan(const Reader& reader, const std::map<int, std::vector<std::string>>& state_names,
                       const std::string& step_name, int64_t chunk, int device, std::optional<int> gradients)
    : reader_(reader),
      state_names_(rules().size()),
      scale_names_(rules().size()),
      scalar_names_(rules().size()),
      plan_(chunk),
      device_(device),
      gradients_(gradients.value_or(device)) {
#if defined(PRECOND_CUDA)
  if (device_ >= 0) cuda_ = std::make_unique<CudaExecutor>(device_);
#if defined(PRECOND_CUDA_ON_HOST)
  device_ = gradients_ = kCpuDevice;
#endif
#else
  if (device_ >= 0) throw std::invalid_argument("this extension was built without CUDA");
#endif
  const auto intern = [](const std::string& s) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(s.c_str()));
  };
  for (const auto& [rule, names] : state_names) {
    const RuleInfo& info = rules().at(size_t(rule));
    if (int(names.size()) != info.states + info.scalar_states)
      throw py::value_error("a rule must have a name for each of its states");
    const auto scalar = names.begin() + info.states;
    for (auto name = names.begin(); name != scalar; ++name) {
      state_names_[size_t(rule)].push_back(intern(*name));
      scale_names_[size_t(rule)].push_back(intern(*name + "_scale"));
    }
    if (scalar != names.end()) scalar_names_[size_t(rule)] = intern(*scalar);
  }
  remainder_name_ = intern("remainder");
  key_name_ = intern("key");
  if (!step_name.empty()) step_name_ = intern(step_name);
  params_name_ = intern("params");
  grad_name_ = intern("grad");
}

TensorPlan::Trace TensorPlan::trace(py::handle object, const View& view) const {
  const py::handle tensor = view.read_of(object);
  Trace trace{tensor.ptr(), view.shape, nullptr, tensor.is(object) ? nullptr : object.ptr()};
  try {
    trace.storage = reinterpret_cast<const void*>(tensor.attr("untyped_storage")().attr("_cdata").cast<uintptr_t>());
  } catch (py::error_already_set&) {
    // A tensor without such a storage is only read more slowly.
  }
  return trace;
}

// What a plan can update. Tensors without memory of their own (fake, meta, lazy zeros) have no address.
bool TensorPlan::fits(const View& view, int device) {
  if (!is_value(view.storage) || view.device != device) return false;
  if (view.data != nullptr) return true;
  for (int d = 0; d < view.ndim; ++d)
    if (view.shape[d] == 0) return true;
  return false;
}

// The step counter or a scalar state, of one element in any number of dimensions; none where it cannot be one.
Number TensorPlan::number_of(const View& view, bool on_device) const {
  if (view.device != (on_device ? device_ : kCpuDevice) || !is_one_element(view)) return {};
  switch (view.storage) {
    case Storage::fp32:
      return {view.data, NumberType::fp32};
    case Storage::fp64:
      return {view.data, NumberType::fp64};
    case Storage::int32:
      return {view.data, NumberType::int32};
    case Storage::int64:
      return {view.data, NumberType::int64};
    default:
      return {};
  }
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

bool TensorPlan::is_codes(const View& view, Format format, int64_t numel) const {
  return is_beside(view, info_of(format).storage, (numel * item_bits(format) + 7) / 8);
}

bool TensorPlan::is_scales(const View& view, int64_t numel) const {
  return is_beside(view, Storage::bf16, (numel + kGroup - 1) / kGroup);
}

// 16 bits lie in two int8, since NCCL and gloo gather no int16.
bool TensorPlan::is_remainder(const View& view, Format format, int64_t numel) const {
  return is_beside(view, Storage::int8, numel * (remainder_bits(format) / 8));
}

// Where `view` keeps its elements. slot: the strides that may be overwritten, or kDense to add new ones.
Operand TensorPlan::operand_of(const Entry& entry, const View& view, Format format, int32_t* slot, const char* what) {
  Operand operand;
  operand.data = view.data;
  operand.format = format;
  if (info_of(format).storage != view.storage)
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
                     const std::array<int64_t, 3>& place, int64_t at) {
  if (at >= 0 && (at >= int64_t(entries_.size()) || entries_[size_t(at)].kind != Kind::kDeferred ||
                  entries_[size_t(at)].param != param.ptr()))
    throw py::value_error("at must be the number of this parameter, which was deferred");
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
  tensor.number = int32_t(at < 0 ? int64_t(entries_.size()) : at);
  tensor.fresh = fresh;
  tensor.numel = 1;
  for (int d = 0; d < view.ndim; ++d) tensor.numel *= view.shape[d];
  int32_t slot = kDense;
  const auto format_of = [&](size_t operand) {
    return formats.empty() ? plain_format(view.storage) : Format(formats.at(operand));
  };
  for (const int format : formats) entry.logical = entry.logical || !is_plain(Format(format));
  tensor.p = operand_of(entry, view, format_of(0), &slot, "a parameter");
  const std::vector<py::object>& names = state_names_[size_t(rule)];
  for (size_t k = 0; k < names.size(); ++k) {
    reader_.read(state[names[k]].ptr(), &view);
    if (is_coded(format_of(1 + k))) {
      tensor.state[k].format = format_of(1 + k);
      tensor.state[k].data = view.data;
      if (!is_codes(view, tensor.state[k].format, tensor.numel))
        throw py::type_error("state " + py::str(names[k]).cast<std::string>() + " must be the codes of its format");
      continue;
    }
    if (!fits(view) || !same_shape(entry, view))
      throw py::type_error(
          "state " + py::str(names[k]).cast<std::string>() +
          " must be float32, bfloat16, float16 or complex64 on the plan's device, and of its parameter's shape");
    slot = kDense;
    tensor.state[k] = operand_of(entry, view, format_of(1 + k), &slot, "a state");
  }
  tensor.draws = draws;
  if (draws) tensor.key = state[key_name_].cast<uint64_t>();
  tensor.place = {place[0], place[1], place[2]};
  if (has_remainder(tensor.p.format)) {
    reader_.read(state[remainder_name_].ptr(), &view);
    if (!is_remainder(view, tensor.p.format, tensor.numel))
      throw py::type_error("state remainder must be that of the parameter's format");
    tensor.p.beside = view.data;
  }
  for (size_t k = 0; k < names.size(); ++k) {
    if (!is_coded(tensor.state[k].format)) continue;
    reader_.read(state[scale_names_[size_t(rule)][k]].ptr(), &view);
    if (!is_scales(view, tensor.numel))
      throw py::type_error("state " + py::str(scale_names_[size_t(rule)][k]).cast<std::string>() +
                           " must have a bfloat16 for each group");
    tensor.state[k].beside = view.data;
  }
  if (counts) {
    reader_.read(state[step_name_].ptr(), &view);
    tensor.step = number_of(view, step_on_device);
    if (!tensor.step) throw py::type_error("state step must be a tensor of one float32, float64, int32 or int64");
    tensor.step_on_device = step_on_device;
  } else if (rules()[size_t(rule)].reads_step) {
    throw py::value_error(std::string(rules()[size_t(rule)].name) + " reads the step counter: counts must be True");
  }
  if (const py::object& name = scalar_names_[size_t(rule)]) {
    reader_.read(state[name].ptr(), &view);
    tensor.scalar = number_of(view, step_on_device);
    if (!tensor.scalar)
      throw py::type_error("state " + py::str(name).cast<std::string>() +
                           " must be a tensor of one float32 or float64, beside step");
  }
  entry.has_state = !names.empty() || counts || tensor.scalar || has_remainder(tensor.p.format) || draws;
  if (at < 0) {
    entry.tensor = plan_.add(tensor);
    entries_.push_back(entry);
    traces_.emplace_back();
    return;
  }
  entry.tensor = entries_[size_t(at)].tensor;
  tensor.norm_class = plan_.tensor(entry.tensor).norm_class;
  plan_.put(entry.tensor, tensor);
  entries_[size_t(at)] = entry;
  traces_[size_t(at)] = {};
}

void TensorPlan::add_ready(const py::list& params, const py::dict& state, int group, int rule, bool counts,
                           bool step_on_device) {
  if (state_of_.empty()) state_of_ = states_by_param(state);
  for (const py::handle param : params) {
    const auto found = state_of_.find(param.ptr());
    const py::object held = found == state_of_.end() ? py::none() : found->second;
    add(param, held, group, rule, false, counts, step_on_device, {}, false, {0, 0, 0}, -1);
  }
}

void TensorPlan::ignore(py::handle param, int group) {
  entries_.emplace_back();
  traces_.emplace_back();
  entries_.back().param = param.ptr();
  entries_.back().group = group;
  entries_.back().kind = Kind::kIgnored;
}

void TensorPlan::defer(py::handle param, int group) {
  ignore(param, group);
  entries_.back().kind = Kind::kDeferred;
  Tensor none;
  none.group = group;
  none.number = int32_t(entries_.size()) - 1;
  entries_.back().tensor = plan_.add(none);
}

void TensorPlan::seal(const py::dict& state) {
  std::unordered_map<PyObject*, int32_t> entry_of;
  size_t missing = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].kind != Kind::kUpdated) continue;
    entry_of[entries_[i].param] = int32_t(i);
    missing += entries_[i].has_state;
  }
  state_of_.clear();
  state_items_.clear();
  for (const auto& item : state) {
    const auto found = entry_of.find(item.first.ptr());
    state_items_.emplace_back(item.first.ptr(), found == entry_of.end() ? -1 : found->second);
    if (found != entry_of.end()) missing -= entries_[size_t(found->second)].has_state;
  }
  // States that were deleted before a newcomer joined: nothing else would look for them, and a step would write them.
  complete_ = missing == 0;
}

void TensorPlan::set_norm_classes(const std::vector<int>& classes) {
  if (classes.size() != entries_.size()) throw py::value_error("there must be a class for each parameter");
  for (size_t i = 0; i < entries_.size(); ++i)
    if (entries_[i].tensor >= 0) plan_.tensor(entries_[i].tensor).norm_class = classes[i];
}

}  // namespace precond
