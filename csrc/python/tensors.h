// From Python's tensors to a plan: reads addresses (build.cpp), checks at each step that the plan still describes what
// the optimizer holds (refresh.cpp), and runs it (run.cpp).
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cuda/executor.h"
#include "plan/plan.h"
#include "python/offload.h"
#include "python/reader.h"

namespace precond {

// What Python asks for a group in a step: a row of the plan, and hyper-parameters that lie on the device.
struct Request {
  GroupRow row;
  std::vector<Override> overrides;  // whose group is not known yet
};

// A plan and the identities it was built from. Objects are only compared, so the plan keeps none of them alive.
class TensorPlan {
 public:
  // state_names: by rule number, the keys of a parameter's state in the order of the rule's state arguments, then that
  // of its scalar state; step_name: the counter's key, or empty; gradients: the device of these, where that is another
  // one than `device`.
  TensorPlan(const Reader& reader, const std::map<int, std::vector<std::string>>& state_names,
             const std::string& step_name, int64_t chunk, int device, std::optional<int> gradients);

  // Parameters, in the order of optimizer.param_groups. `state` is the parameter's entry in optimizer.state; `fresh`
  // says that it was made for the coming step, `counts` that it has a step counter, `step_on_device` where that lies.
  // formats: those of the parameter and of each state, or empty where the dtypes say it all. draws: rounds
  // stochastically, with the state's key; place: begin, row and row_step of Place. at: among all parameters the number
  // of a deferred one that is to be updated from now on, or -1 for the next one.
  void add(py::handle param, py::handle state, int group, int rule, bool fresh, bool counts, bool step_on_device,
           const std::vector<int>& formats, bool draws, const std::array<int64_t, 3>& place, int64_t at);
  // All parameters of a group, which Reader::ready has found so. `state`: of each parameter the dictionary of its
  // states.
  void add_ready(const py::list& params, const py::dict& state, int group, int rule, bool counts, bool step_on_device);
  // A parameter that has no states, since it never had a gradient. The plan does not hold as soon as it has one.
  void defer(py::handle param, int group);
  // A parameter that another backend updates.
  void ignore(py::handle param, int group);
  // After the last parameter, and after each that was added later.
  void seal(const py::dict& state);

  // Makes the plan that of the coming step. False where it no longer describes what the optimizer holds; nothing has
  // changed then. rows: a Request for each group. inputs: parameter -> tensor to use instead of its `.grad` (matrix
  // methods hand over rotated gradients).
  bool refresh(const py::list& param_groups, const py::dict& state, const py::dict& inputs, const py::list& rows);
  // After a refresh() that returned false: the numbers of the deferred parameters that have a gradient now, where that
  // alone is why.
  const std::vector<int64_t>& newcomers() const { return newcomers_; }
  // True where refresh() found a parameter to update.
  bool has_gradients() const { return has_gradients_; }
  // Lets go of what refresh() holds, whatever has come of the step.
  void release() { held_.clear(); }
  // The class of the norm that each parameter belongs to. Without this call there is one.
  void set_norm_classes(const std::vector<int>& classes);
  // Fills clip.total with the norms of what refresh() found, one per class.
  void norm(const Clip& clip, int threads);
  void norm_cuda(const Clip& clip, uintptr_t stream);
  // Updates what refresh() found, and returns those parameters; on the CPU none if the step was skipped.
  py::list run(float grad_coef, float clip_value, const Clip& clip, int threads, const Extras& extras);
  py::list run_cuda(float grad_coef, float clip_value, const Clip& clip, uintptr_t grad_scale, uintptr_t found_inf,
                    uintptr_t stream, const Extras& extras);
  // The same for a plan of the host, whose gradients are on the link's device: enqueues it and returns. params: of each
  // parameter that is updated the address of what is updated with it on the device. `held`: what lives until it is
  // done.
  py::list submit(HostLink* link, const std::vector<uintptr_t>& params, float grad_coef, float clip_value,
                  const Clip& clip, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t stream, int threads,
                  const Extras& extras, const py::object& held);
  bool skipped() const { return skipped_; }
  int launches() const;
  bool was_captured() const;

  Plan& plan() { return plan_; }

 private:
  enum class Kind : int32_t { kUpdated, kDeferred, kIgnored };
  // Where a tensor was described when it was last read: its Python object, its sizes, its storage and what wraps it.
  // Only prefetched, so it may be out of date. A step over ten thousand tensors is bound by cache misses on exactly
  // these.
  struct Trace {
    const void* object = nullptr;
    const void* shape = nullptr;
    const void* storage = nullptr;
    const void* wrapper = nullptr;
    void prefetch() const;
  };
  struct Traces {
    Trace p, g, state[kMaxStates], step, scalar;
    Reader::Placed placed;  // parameter and gradient
    int32_t refreshed = 0;  // with a gradient: traces are taken the second time, since a plan may serve for one step
  };
  struct Entry {
    PyObject* param;
    Kind kind;
    int32_t group = 0;
    int32_t tensor = -1;  // deferred ones have one too, so that norms are added up in the order of the parameters
    int32_t ndim = 0;
    int32_t g_slot = kDense;  // strides of a gradient that is not dense
    bool has_state = false;   // something in optimizer.state that a step reads or writes
    bool logical = false;     // visited in the order of indices, not of memory
    int64_t dims = 0;         // shape, then strides of the parameter
  };

  bool refresh_gradients(const py::list& param_groups, const py::dict& inputs);
  bool refresh_states(const py::dict& state);
  bool fits(const View& view) const { return fits(view, device_); }
  static bool fits(const View& view, int device);
  Number number_of(const View& view, bool on_device) const;
  py::list updated();
  Trace trace(py::handle object, const View& view) const;
  py::object gradient_of(PyObject* param, const py::dict& inputs) const;
  bool same_state(const Entry& entry, PyObject* param_state, View* view, Traces* traces);
  bool same_special(const Tensor& tensor, PyObject* param_state, View* view);
  Order order_of(const Entry& entry) const;
  bool is_beside(const View& view, Storage storage, int64_t count) const;
  bool is_codes(const View& view, Format format, int64_t numel) const;
  bool is_scales(const View& view, int64_t numel) const;
  bool is_remainder(const View& view, Format format, int64_t numel) const;
  bool same_operand(const Operand& operand, const Entry& entry, const View& view) const;
  bool same_number(const Number& number, const py::object& name, bool on_device, PyObject* param_state, View* view,
                   Trace* trace_of) const;
  bool same_shape(const Entry& entry, const View& view) const;
  bool same_strides(const Entry& entry, const View& view) const;
  Operand operand_of(const Entry& entry, const View& view, Format format, int32_t* slot, const char* what);

  const Reader& reader_;
  std::vector<std::vector<py::object>> state_names_, scale_names_;  // of each rule
  std::vector<py::object> scalar_names_;                            // of each rule; null without a scalar state
  py::object step_name_, params_name_, grad_name_, remainder_name_, key_name_;
  Plan plan_;
  int device_;            // that tensors must be on
  int gradients_;         // and their gradients
  bool skipped_ = false;  // by the last step on the CPU
  std::vector<GroupRow> rows_;
  std::vector<Override> overrides_;
  std::vector<int64_t> newcomers_;
  bool has_gradients_ = false;
  bool complete_ = false;  // seal() found the states of every parameter that is updated
  // Gradients and the dictionaries of states, from refresh() to release(): while the GIL is released another thread may
  // give the optimizer others.
  std::vector<py::object> held_;
#if defined(PRECOND_CUDA)
  std::unique_ptr<CudaExecutor> cuda_;
  std::shared_ptr<HostJob> submitted_;  // the last one
#endif
  std::vector<Entry> entries_;
  std::vector<Traces> traces_;  // of each entry
  std::vector<int64_t> dims_;
  StateOf state_of_;                                        // until seal()
  std::vector<std::pair<PyObject*, int32_t>> state_items_;  // key and entry of each item of optimizer.state
};

}  // namespace precond
