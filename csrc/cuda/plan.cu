// Host side of the CUDA backend; see plan.h.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <array>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cuda/kernel.cuh"
#include "cuda/launch.h"
#include "cuda/norm.cuh"
#include "cuda/tables.h"

namespace precond {
namespace {

// Launchers by rule and formats of p, g and states. The last two of a rule take any layout and mix, and formats that do
// not stand alone.
template <class Rule, class P, class G, class S>
void launch_update(const LaunchArgs& a) {
  launch(&update_kernel<Rule, P, G, S>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.rows, a.control);
}
template <class Rule>
void launch_any(const LaunchArgs& a) {
  launch(&update_any_kernel<Rule>, a.blocks, kThreads, a.stream, a.tensors, a.chunks, a.strides, a.rows, a.control);
}

// A kernel for each three formats that training mixes: fp32 and one kind of 16 bits. None where a rule has no state
// whose format could differ.
using AllFormats = std::tuple<Fp32, Bf16, Fp16>;
constexpr int kAny = kPlainFormats * kPlainFormats * kPlainFormats, kTiled = kAny + 1;
template <class Rule, int kP, int kG, int kS>
constexpr Launcher fast_launcher() {
  constexpr int kBoth = (1 << kP | 1 << kG | 1 << kS) >> 1;
  if constexpr (kBoth == 3 || (Rule::kStates == 0 && kS != kP))
    return nullptr;
  else
    return &launch_update<Rule, std::tuple_element_t<kP, AllFormats>, std::tuple_element_t<kG, AllFormats>,
                          std::tuple_element_t<kS, AllFormats>>;
}
template <class Rule, int... I>
constexpr std::array<Launcher, kAny + 1> launchers_of(std::integer_sequence<int, I...>) {
  return {fast_launcher<Rule, I / (kPlainFormats * kPlainFormats), I / kPlainFormats % kPlainFormats,
                        I % kPlainFormats>()...,
          &launch_any<Rule>};
}
#define PRECOND_LAUNCHERS(name, ...) launchers_of<__VA_ARGS__>(std::make_integer_sequence<int, kAny>{}),
const std::array<Launcher, kAny + 1> kLaunchers[] = {PRECOND_ALL_RULES(PRECOND_LAUNCHERS)};
#undef PRECOND_LAUNCHERS
#define PRECOND_STATES(name, ...) __VA_ARGS__::kStates,
const int kStatesOf[] = {PRECOND_ALL_RULES(PRECOND_STATES)};
#undef PRECOND_STATES

// Which launcher takes a tensor.
int launcher_of(const Tensor& t) {
  const int states = kStatesOf[t.rule];
  bool plain = is_plain(t.p.format);
  for (int k = 0; k < states; ++k) plain = plain && is_plain(t.state[k].format);
  if (!plain) return kTiled;
  bool any = t.p.strides != kDense || t.g.strides != kDense;
  for (int k = 0; k < states; ++k) any = any || t.state[k].strides != kDense || t.state[k].format != t.state[0].format;
  if (any) return kAny;
  const Format state = states == 0 ? t.p.format : t.state[0].format;
  const int fast = (int(t.p.format) * kPlainFormats + int(t.g.format)) * kPlainFormats + int(state);
  return kLaunchers[t.rule][size_t(fast)] != nullptr ? fast : kAny;
}

}  // namespace

struct CudaPlan::Impl {
  explicit Impl(int index) : device(index) {}

  int device;
  int launches = 0;
  bool was_captured = false;
  Table<DeviceTensor> tensors;
  Table<DeviceChunk> chunks;
  Table<Strides> strides;
  Table<float> rows;
  Table<Control> control;
  Table<RowJob> jobs;
  Table<DeviceGroup> groups;
  Table<Override> overrides;
  Table<int64_t> norm_first;
  Table<double> norm_sums;
  struct Bucket {
    int rule, launcher;
    int64_t first, count;
  };
  std::vector<Bucket> buckets;
  std::vector<int> signature;  // rule and launcher of each tensor, as cut into buckets

  void cut(const Plan& plan);
  void describe(const Plan& plan, const std::vector<GroupRow>& group_rows, bool row_per_tensor);
  void scalars_on_device(const Plan& plan, const std::vector<GroupRow>& group_rows, const DeviceStep& step);
  Use use_of(uintptr_t stream);
  void upload_tensors(const Use& use);
  void measure(const Plan& plan, const Clip& clip, const Use& use);
};

// Called first by whatever enqueues work, in the relaxed mode of capture.
Use CudaPlan::Impl::use_of(uintptr_t handle) {
  const auto stream = reinterpret_cast<cudaStream_t>(handle);
  const bool capturing = is_capturing(stream);
  if (!capturing) Discarded::of_process().free_all();
  return {stream, capturing, was_captured || capturing};
}

// The first of what a step enqueues.
void CudaPlan::Impl::upload_tensors(const Use& use) {
  was_captured = use.captured;
  tensors.upload(use);
  chunks.upload(use);
  strides.upload(use);
}

// The tables of tensors and chunks are there.
void CudaPlan::Impl::measure(const Plan& plan, const Clip& clip, const Use& use) {
  const NormTable table = norm_table(plan, clip.classes);
  norm_first.host = table.first;
  norm_first.upload(use);
  const int64_t blocks = table.begin.back();
  // Behind the sums of blocks those of blocks of sums, which are never as many.
  double* sums = norm_sums.room_for(size_t(2 * blocks + 2), use);
  if (!chunks.host.empty())
    launch(&norm_kernel, int64_t(chunks.host.size()), kThreads, use.stream,
           static_cast<const DeviceTensor*>(tensors.device()), static_cast<const DeviceChunk*>(chunks.device()),
           static_cast<const Strides*>(strides.device()), static_cast<const int64_t*>(norm_first.device()), clip.inf,
           sums);
  launches += int(!chunks.host.empty());
  double* spare = sums + blocks;
  for (int c = 0; c < clip.classes; ++c) {
    const double* in = sums + table.begin[size_t(c)];
    int64_t n = table.begin[size_t(c) + 1] - table.begin[size_t(c)];
    while (true) {
      const int64_t folded = n > kNormBlock ? (n + kNormBlock - 1) / kNormBlock : 1;
      double* out = folded == 1 ? clip.total + c : spare;
      launch(&fold_kernel, folded, kThreads, use.stream, in, n, clip.inf, out);
      ++launches;
      if (folded == 1) break;
      in = out;
      n = folded;
      spare += folded;
    }
  }
}

// Chunks by launcher; only when the rule or the formats of a tensor have changed.
void CudaPlan::Impl::cut(const Plan& plan) {
  std::vector<int> wanted;
  wanted.reserve(size_t(plan.size()));
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    // One that never had a gradient has none to describe: it joins when it gets one.
    wanted.push_back(t.g.data == nullptr && t.numel > 0 ? -1 : t.rule * (kTiled + 1) + launcher_of(t));
  }
  if (wanted == signature) return;
  signature = wanted;
  buckets.clear();
  chunks.host.clear();
  std::map<int, std::vector<int32_t>> tensors_of;
  for (size_t i = 0; i < signature.size(); ++i)
    if (signature[i] >= 0) tensors_of[signature[i]].push_back(int32_t(i));
  for (const auto& [key, members] : tensors_of) {
    const int64_t first = int64_t(chunks.host.size());
    for (const int32_t i : members)
      for (int64_t begin = 0; begin < plan.tensor(i).numel; begin += kBlockElements) chunks.host.push_back({begin, i});
    const int64_t count = int64_t(chunks.host.size()) - first;
    if (count > 0) buckets.push_back({key / (kTiled + 1), key % (kTiled + 1), first, count});
  }
}

void CudaPlan::Impl::describe(const Plan& plan, const std::vector<GroupRow>& group_rows, bool row_per_tensor) {
  tensors.host.resize(size_t(plan.size()));
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    DeviceTensor& d = tensors.host[size_t(i)];
    std::memset(static_cast<void*>(&d), 0, sizeof d);  // padding too: tables are compared as bytes
    d.operand[0] = t.p;
    d.operand[1] = t.g;
    for (int k = 0; k < kMaxStates; ++k) d.operand[2 + k] = t.state[k];
    d.numel = t.active ? t.numel : 0;
    d.place = t.place;
    d.draws = t.draws;
    d.row = row_per_tensor ? int32_t(i) : t.row;
    d.sign = group_rows[size_t(t.group)].sign;
  }
  strides.host = plan.all_strides();
}

void CudaPlan::Impl::scalars_on_device(const Plan& plan, const std::vector<GroupRow>& group_rows,
                                       const DeviceStep& step) {
  jobs.host.resize(size_t(plan.size()));
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    RowJob& job = jobs.host[size_t(i)];
    std::memset(static_cast<void*>(&job), 0, sizeof job);
    job.group = t.active ? t.group : -1;
    job.fresh = t.fresh;
    job.draws = t.draws;
    job.key = t.key;
    if (t.step != nullptr && t.step_on_device)
      job.step = t.step;
    else if (t.step != nullptr)
      job.known_step = *t.step + 1.0f;
  }
  groups.host.resize(group_rows.size());
  for (size_t g = 0; g < group_rows.size(); ++g) {
    std::memset(static_cast<void*>(&groups.host[g]), 0, sizeof(DeviceGroup));
    groups.host[g].rule = group_rows[g].rule;
    std::memcpy(groups.host[g].hyper, group_rows[g].hyper, sizeof groups.host[g].hyper);
  }
  overrides.host = step.overrides;
}

void CudaPlan::run(Plan* plan, const std::vector<GroupRow>& groups, const DeviceStep& step) {
  Impl& my = *impl_;
  require_current(my.device);
  const RelaxedCapture relaxed;
  const Use use = my.use_of(step.stream);

  const bool may_skip = step.found_inf != nullptr || (step.clip.total != nullptr && step.clip.skip_nonfinite);
  bool on_device = !step.overrides.empty() || step.grad_scale != nullptr || may_skip || step.clip.total != nullptr;
  bool counters_on_device = true;
  for (int64_t i = 0; i < plan->size(); ++i) {
    const Tensor& t = plan->tensor(i);
    if (!t.active || t.step == nullptr) continue;
    on_device = on_device || t.step_on_device;
    counters_on_device = counters_on_device && t.step_on_device;
  }
  if (use.capturing && !counters_on_device)
    throw std::runtime_error(
        "capturable must be True to capture a step into a graph: the step counters are on the host");
  if (may_skip && !counters_on_device)
    throw std::runtime_error(
        "fused must be True in every group for a loss scaler's found_inf and for nonfinite='skip': step counters are "
        "on "
        "the host");

  my.cut(*plan);
  if (on_device)
    my.scalars_on_device(*plan, groups, step);
  else
    my.rows.host = plan->fill_rows(groups);
  my.describe(*plan, groups, on_device);
  my.upload_tensors(use);
  my.launches = 0;
  if (step.clip.measure) my.measure(*plan, step.clip, use);
  if (on_device) {
    my.jobs.upload(use);
    my.groups.upload(use);
    my.overrides.upload(use);
    const int64_t count = plan->size();
    Control* control = my.control.room_for(1, use);
    float* rows = my.rows.room_for(size_t(count) * kRowFloats, use);
    launch(&control_kernel, 1, 1, use.stream, step.grad_scale, step.found_inf, step.grad_coef, step.clip_value,
           step.clip, control);
    launch(&row_kernel, (count + 127) / 128, 128, use.stream, static_cast<const RowJob*>(my.jobs.device()),
           int32_t(count), static_cast<const DeviceGroup*>(my.groups.device()),
           static_cast<const Override*>(my.overrides.device()), int32_t(step.overrides.size()),
           static_cast<const Control*>(control), rows);
    my.launches += 2;
  } else {
    my.control.host = {Control{step.grad_coef, 0.0f, step.clip_value}};
    my.control.upload(use);
    my.rows.upload(use);
  }
  for (const Impl::Bucket& bucket : my.buckets) {
    const Launcher launcher =
        bucket.launcher == kTiled ? tiled_launcher(bucket.rule) : kLaunchers[bucket.rule][size_t(bucket.launcher)];
    launcher({my.tensors.device(), my.chunks.device() + bucket.first, my.strides.device(), my.rows.device(),
              my.control.device(), bucket.count, use.stream});
    ++my.launches;
  }
  plan->count_step();
}

void CudaPlan::norm(const Plan& plan, const std::vector<GroupRow>& groups, const DeviceStep& step) {
  Impl& my = *impl_;
  require_current(my.device);
  const RelaxedCapture relaxed;
  const Use use = my.use_of(step.stream);
  my.cut(plan);
  my.describe(plan, groups, true);
  my.upload_tensors(use);
  my.measure(plan, step.clip, use);
}

CudaPlan::CudaPlan(int device) : impl_(std::make_unique<Impl>(device)) {}

CudaPlan::~CudaPlan() = default;

int CudaPlan::launches() const { return impl_->launches; }

bool CudaPlan::was_captured() const { return impl_->was_captured; }

std::string why_no_cuda() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no CUDA device: ") + cudaGetErrorString(error);
  }
  return count > 0 ? "" : "no CUDA device";
}

std::string why_not_on(int device) {
  require_current(device);
  const RelaxedCapture relaxed;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&control_kernel));
  if (error == cudaSuccess) return "";
  // Any other error, out of memory say, may be gone at the next call.
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction)
    check(error, "cudaFuncGetAttributes");
  cudaGetLastError();  // said here
  return "the extension has " + std::string(PRECOND_CUDA) + ", and nothing that device " + std::to_string(device) +
         " can run: " + cudaGetErrorString(error);
}

}  // namespace precond
