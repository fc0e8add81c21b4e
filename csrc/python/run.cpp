// A step of a plan that was refreshed; see tensors.h.
#include <stdexcept>

#include "base/denormals.h"
#include "cpu/norm.h"
#include "cpu/update.h"
#include "python/tensors.h"

namespace precond {

py::list TensorPlan::updated() {
  py::list list;
  for (const Entry& entry : entries_)
    if (entry.kind == Kind::kUpdated && plan_.tensor(entry.tensor).active) list.append(py::handle(entry.param));
  return list;
}

void TensorPlan::norm(const Clip& clip, int threads) {
  const py::gil_scoped_release release;
  measure_on_cpu(plan_, clip, threads);
}

py::list TensorPlan::run(float grad_coef, float clip_value, const Clip& clip, int threads, const Extras& extras) {
  Control control{grad_coef, 0.0f, clip_value};
  {
    const py::gil_scoped_release release;
    if (clip.measure) measure_on_cpu(plan_, clip, threads);
    {
      const IeeeDenormals ieee;
      finish(clip, &control);
    }
    skipped_ = control.skip != 0.0f;
    if (!skipped_) run_on_cpu(&plan_, rows_, control, threads, extras);
  }
  return skipped_ || extras.only ? py::list() : updated();
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
                              uintptr_t found_inf, uintptr_t stream, const Extras& extras) {
  DeviceStep step;
  step.extras = extras;
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
  return extras.only ? py::list() : updated();
}
py::list TensorPlan::submit(HostLink* link, const std::vector<uintptr_t>& params, float grad_coef, float clip_value,
                            const Clip& clip, uintptr_t grad_scale, uintptr_t found_inf, uintptr_t stream, int threads,
                            const Extras& extras, const py::object& held) {
  if (submitted_) {
    link->wait_for(submitted_);  // its counters
  }
  HostStep step;
  step.plan = &plan_;
  step.groups = &rows_;
  step.params.resize(size_t(plan_.size()), nullptr);
  size_t next = 0;
  for (const Entry& entry : entries_)
    if (entry.kind == Kind::kUpdated && plan_.tensor(entry.tensor).active)
      step.params[size_t(entry.tensor)] = reinterpret_cast<void*>(params.at(next++));
  step.grad_scale = reinterpret_cast<const float*>(grad_scale);
  step.found_inf = reinterpret_cast<const float*>(found_inf);
  step.grad_coef = grad_coef;
  step.clip_value = clip_value;
  step.clip = clip;
  step.extras = extras;
  step.stream = stream;
  step.threads = threads;
  submitted_ = link->submit(step, held);
  return extras.only ? py::list() : updated();
}
int TensorPlan::launches() const { return cuda_ ? cuda_->launches() : 1; }
bool TensorPlan::was_captured() const { return cuda_ && cuda_->was_captured(); }
#else
void TensorPlan::norm_cuda(const Clip&, uintptr_t) {
  throw std::invalid_argument("this extension was built without CUDA");
}
py::list TensorPlan::run_cuda(float, float, const Clip&, uintptr_t, uintptr_t, uintptr_t, const Extras&) {
  throw std::invalid_argument("this extension was built without CUDA");
}
int TensorPlan::launches() const { return 1; }
bool TensorPlan::was_captured() const { return false; }
#endif

}  // namespace precond
