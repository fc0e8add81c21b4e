// Host side of the CUDA backend; see executor.h.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "cuda/executor.h"
#include "cuda/family.h"
#include "cuda/norm.cuh"
#include "cuda/tables.h"
#include "families.h"
#include "rules/registry.h"

namespace precond {
inline namespace PRECOND_ISA {

// 1 / scale and the skip flag, from GradScaler's tensors, either of which may be null, and what the norm makes of them.
__global__ void control_kernel(const float* grad_scale, const float* found_inf, float grad_coef, float clip_value,
                               Clip clip, Control* control) {
  control->clip_value = clip_value;
  control->grad_coef = grad_scale == nullptr ? grad_coef : float(1.0 / double(*grad_scale)) * grad_coef;
  control->skip = found_inf != nullptr && *found_inf != 0.0f ? 1.0f : 0.0f;
  finish(clip, control);
}

#define PRECOND_KERNELS(family)              \
  namespace family {                         \
  extern const PlainKernels kPlain[];        \
  extern const LaunchUpdate kMixed[];        \
  extern const FixedKernels kFixed[];        \
  void launch_scalars(const ScalarsArgs& a); \
  }
PRECOND_FAMILIES(PRECOND_KERNELS)
#undef PRECOND_KERNELS

}  // namespace PRECOND_ISA
namespace {

struct FamilyKernels {
  const PlainKernels* plain;
  const LaunchUpdate* mixed;
  const FixedKernels* fixed;
  LaunchScalars scalars;
};
#define PRECOND_KERNELS(family) {family::kPlain, family::kMixed, family::kFixed, &family::launch_scalars},
constexpr FamilyKernels kFamilies[] = {PRECOND_FAMILIES(PRECOND_KERNELS)};
#undef PRECOND_KERNELS

struct FixedOf {
  Format p, g, mean, square;
};
#define PRECOND_FORMATS_OF(P, G, Mean, Square) {format_of<P>(), format_of<G>(), format_of<Mean>(), format_of<Square>()},
constexpr FixedOf kFixedOf[] = {PRECOND_FIXED(PRECOND_FORMATS_OF)};
#undef PRECOND_FORMATS_OF

// Which kernel of a rule takes a chunk: one of plain.cuh by formats, or that for strides, or that of mixed.cuh, or
// one of fixed.cuh by formats.
constexpr int kMixed = kAny + 1, kFixed = kMixed + 1, kKernels = kFixed + kFixedFormats;
struct RuleKernels {
  int family;
  LaunchUpdate launch[kKernels];
};
const std::vector<RuleKernels>& kernels() {
  static const std::vector<RuleKernels> by_number = [] {
    std::vector<RuleKernels> all;
    for (size_t f = 0; f < families().size(); ++f) {
      for (int rule = 0; rule < families()[f].count; ++rule) {
        RuleKernels of_rule{int(f), {}};
        std::copy_n(kFamilies[f].plain[rule].launch, kAny + 1, of_rule.launch);
        of_rule.launch[kMixed] = kFamilies[f].mixed[rule];
        std::copy_n(kFamilies[f].fixed[rule].launch, kFixedFormats, of_rule.launch + kFixed);
        all.push_back(of_rule);
      }
    }
    return all;
  }();
  return by_number;
}

// `notes`: the step takes statistics of tensors whose rules have them.
int kernel_for(const Tensor& t, bool notes) {
  if (notes && rules()[size_t(t.rule)].has_parts) return kMixed;
  const int states = rules()[size_t(t.rule)].states;
  const Format state = states == 0 ? t.p.format : t.state[0].format;
  bool plain = is_plain(t.p.format), dense = t.p.strides == kDense && t.g.strides == kDense, alike = true;
  for (int k = 0; k < states; ++k) {
    plain = plain && is_plain(t.state[k].format);
    dense = dense && t.state[k].strides == kDense;
    alike = alike && t.state[k].format == state;
  }
  if (!plain) return kMixed;
  const auto has = [&](int kernel) { return kernels()[size_t(t.rule)].launch[kernel] != nullptr; };
  // For strides the kernel of mixed.cuh executes 1.6 times the instructions of this one, for dense tensors 0.75.
  if (!dense) return has(kAny) ? kAny : kMixed;
  const int fast = (int(t.p.format) * kPlainFormats + int(t.g.format)) * kPlainFormats + int(state);
  return alike && has(fast) ? fast : kMixed;
}

// The kernel for its whole chunks; `other`, which takes the rest, where fixed.cuh has none.
int whole_kernel_for(const Tensor& t, int other) {
  if (other != kMixed || t.numel < kBlockElements || t.place.row != 0 || t.place.begin % kRun != 0) return other;
  const RuleInfo& rule = rules()[size_t(t.rule)];
  const auto takes = [](const Operand& operand, Format format) {
    const auto addresses = reinterpret_cast<uintptr_t>(operand.data) |
                           (has_remainder(format) ? reinterpret_cast<uintptr_t>(operand.beside) : 0);
    return operand.format == format && operand.strides == kDense && addresses % 16 == 0;
  };
  for (int f = 0; f < kFixedFormats; ++f) {
    if (kernels()[size_t(t.rule)].launch[kFixed + f] == nullptr) continue;
    bool all = takes(t.p, kFixedOf[f].p) && takes(t.g, kFixedOf[f].g);
    for (int k = 0; k < rule.states; ++k)
      all = all && takes(t.state[k], (rule.squares >> k & 1) != 0 ? kFixedOf[f].square : kFixedOf[f].mean);
    if (all) return kFixed + f;
  }
  return other;
}

// Those with an active tensor.
std::set<int> families_of(const Plan& plan) {
  std::set<int> all;
  for (int64_t i = 0; i < plan.size(); ++i)
    if (plan.tensor(i).active) all.insert(kernels()[size_t(plan.tensor(i).rule)].family);
  return all;
}

}  // namespace

struct CudaExecutor::Impl {
  explicit Impl(int index) : device(index) {}

  int device;
  int launches = 0;
  bool was_captured = false;
  bool notes = false;  // the last step took statistics, or had factors, for which it took them before
  Table<DeviceTensor> tensors;
  Table<DeviceChunk> chunks;
  Table<Strides> strides;
  Table<float> scalars;
  Table<Control> control;
  Table<ScalarsJob> jobs;
  Table<DeviceGroup> groups;
  Table<Override> overrides;
  Table<int64_t> norm_first;
  Table<double> norm_sums;
  Table<int64_t> statistics_first;
  Table<StatisticsJob> statistics_jobs;
  Table<double> statistics;
  Table<Noting> noting;
  struct Bucket {
    int rule, kernel;
    int64_t first, count;
  };
  std::vector<Bucket> buckets;
  std::vector<std::array<int, 2>> signature;  // of each tensor, its whole chunks and its last: bucket_of

  void cut(const Plan& plan, bool notes);
  void describe(const Plan& plan, const std::vector<GroupRow>& asked, bool scalars_per_tensor);
  void scalars_on_device(const Plan& plan, const std::vector<GroupRow>& asked, const DeviceStep& step);
  Use use_of(uintptr_t stream);
  void upload_tensors(const Use& use);
  void measure(const Plan& plan, const Clip& clip, const Use& use);
  const Noting* note(const Plan& plan, const Extras& extras, const Use& use);
};

// Called first by whatever enqueues work, in the relaxed mode of capture.
Use CudaExecutor::Impl::use_of(uintptr_t handle) {
  const auto stream = reinterpret_cast<cudaStream_t>(handle);
  const bool capturing = is_capturing(stream);
  if (!capturing) Discarded::of_process().free_all();
  return {stream, capturing, was_captured || capturing};
}

// The first of what a step enqueues.
void CudaExecutor::Impl::upload_tensors(const Use& use) {
  was_captured = use.captured;
  tensors.upload(use);
  chunks.upload(use);
  strides.upload(use);
}

// The tables of tensors and chunks are there.
void CudaExecutor::Impl::measure(const Plan& plan, const Clip& clip, const Use& use) {
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

// Where kernels put the statistics of blocks; null: nowhere.
const Noting* CudaExecutor::Impl::note(const Plan& plan, const Extras& extras, const Use& use) {
  if (extras.sums == nullptr) return nullptr;
  statistics_first.host = statistic_blocks(plan);
  statistics_first.upload(use);
  double* const table = statistics.room_for(size_t(statistics_first.host.back() + 1) * kBlockStatistics, use);
  statistics_jobs.host.resize(size_t(plan.size()));
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    statistics_jobs.host[size_t(i)] = {statistics_first.host[size_t(i)], t.numel, t.number};
  }
  statistics_jobs.upload(use);
  noting.host = {Noting{statistics_first.device(), table, extras.only}};
  noting.upload(use);
  return noting.device();
}

// Chunks by kernel; only when the rule, the formats or the alignment of a tensor, or `notes`, have changed.
void CudaExecutor::Impl::cut(const Plan& plan, bool notes) {
  const auto bucket_of = [](const Tensor& t, int kernel) { return t.rule * kKernels + kernel; };
  std::vector<std::array<int, 2>> wanted;
  wanted.reserve(size_t(plan.size()));
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    // One that never had a gradient has none to describe: it joins when it gets one.
    if (t.g.data == nullptr && t.numel > 0) {
      wanted.push_back({-1, -1});
      continue;
    }
    const int kernel = kernel_for(t, notes);
    wanted.push_back({bucket_of(t, whole_kernel_for(t, kernel)), bucket_of(t, kernel)});
  }
  if (wanted == signature) return;
  signature = wanted;
  buckets.clear();
  chunks.host.clear();
  std::map<int, std::vector<DeviceChunk>> chunks_of;
  for (size_t i = 0; i < signature.size(); ++i) {
    if (signature[i][0] < 0) continue;
    const int64_t numel = plan.tensor(int64_t(i)).numel;
    for (int64_t begin = 0; begin < numel; begin += kBlockElements)
      chunks_of[signature[i][begin + kBlockElements <= numel ? 0 : 1]].push_back({begin, int32_t(i)});
  }
  for (const auto& [key, members] : chunks_of) {
    buckets.push_back({key / kKernels, key % kKernels, int64_t(chunks.host.size()), int64_t(members.size())});
    chunks.host.insert(chunks.host.end(), members.begin(), members.end());
  }
}

void CudaExecutor::Impl::describe(const Plan& plan, const std::vector<GroupRow>& asked, bool scalars_per_tensor) {
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
    d.scalars = scalars_per_tensor ? int32_t(i) : t.scalars;
    d.sign = asked[size_t(t.group)].sign;
  }
  strides.host = plan.all_strides();
}

void CudaExecutor::Impl::scalars_on_device(const Plan& plan, const std::vector<GroupRow>& asked,
                                           const DeviceStep& step) {
  jobs.host.resize(size_t(plan.size()));
  for (int64_t i = 0; i < plan.size(); ++i) {
    const Tensor& t = plan.tensor(i);
    ScalarsJob& job = jobs.host[size_t(i)];
    std::memset(static_cast<void*>(&job), 0, sizeof job);
    job.group = t.active ? t.group : -1;
    job.fresh = t.fresh;
    job.draws = t.draws;
    job.key = t.key;
    if (step.extras.factors != nullptr) job.factor = step.extras.factors + t.number;
    if (t.step && t.step_on_device) {
      job.step = t.step.data;
      job.scalar = t.scalar.data;
      job.step_type = t.step.type;
      job.scalar_type = t.scalar.type;
    } else if (t.step) {
      job.known_step = t.next_step;
      job.known_scalar = t.next_scalar;
    }
  }
  groups.host.resize(asked.size());
  for (size_t g = 0; g < asked.size(); ++g) {
    std::memset(static_cast<void*>(&groups.host[g]), 0, sizeof(DeviceGroup));
    groups.host[g].rule = asked[g].rule;
    std::memcpy(groups.host[g].hyper, asked[g].hyper, sizeof groups.host[g].hyper);
  }
  overrides.host = step.overrides;
}

// A scalar state on the host is NaN where it is advanced by a hyper-parameter that lies on the device.
static void require_known_scalars(const Plan& plan, const DeviceStep& step) {
  for (const Override& override : step.overrides)
    for (int64_t i = 0; i < plan.size(); ++i) {
      const Tensor& t = plan.tensor(i);
      if (t.active && t.group == override.group && t.scalar && !t.step_on_device && t.next_scalar != t.next_scalar)
        throw std::runtime_error(
            "capturable must be True for a hyper-parameter in a tensor: the host advances a state with it");
    }
}

void CudaExecutor::run(Plan* plan, const std::vector<GroupRow>& groups, const DeviceStep& step) {
  Impl& my = *impl_;
  require_current(my.device);
  const RelaxedCapture relaxed;
  const Use use = my.use_of(step.stream);

  const bool may_skip = step.found_inf != nullptr || (step.clip.total != nullptr && step.clip.skip_nonfinite);
  bool on_device = !step.overrides.empty() || step.grad_scale != nullptr || may_skip || step.clip.total != nullptr ||
                   step.extras.factors != nullptr;
  bool counters_on_device = true;
  for (int64_t i = 0; i < plan->size(); ++i) {
    const Tensor& t = plan->tensor(i);
    if (!t.active || !t.step) continue;
    on_device = on_device || t.step_on_device;
    counters_on_device = counters_on_device && t.step_on_device;
  }
  if (use.capturing && !counters_on_device)
    throw std::runtime_error(
        "capturable must be True to capture a step into a graph: the step counters are on the host");
  if (may_skip && !counters_on_device)
    throw std::runtime_error(
        "fused must be True in every group for a loss scaler's found_inf and for nonfinite='skip': step counters are "
        "on the host");

  my.notes = step.extras.sums != nullptr || step.extras.factors != nullptr;
  my.cut(*plan, my.notes);
  if (on_device) {
    plan->advance(groups);
    require_known_scalars(*plan, step);
    my.scalars_on_device(*plan, groups, step);
  } else {
    my.scalars.host = plan->fill_scalars(groups);
  }
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
    float* scalars = my.scalars.room_for(size_t(count) * kScalarFloats, use);
    launch(&control_kernel, 1, 1, use.stream, step.grad_scale, step.found_inf, step.grad_coef, step.clip_value,
           step.clip, control);
    ++my.launches;
    for (const int family : families_of(*plan)) {
      kFamilies[family].scalars({my.jobs.device(), int32_t(count), my.groups.device(), my.overrides.device(),
                                 int32_t(step.overrides.size()), control, families()[size_t(family)].first,
                                 !step.extras.only, scalars, use.stream});
      ++my.launches;
    }
  } else {
    my.control.host = {Control{step.grad_coef, 0.0f, step.clip_value}};
    my.control.upload(use);
    my.scalars.upload(use);
  }
  const Noting* const noting = my.note(*plan, step.extras, use);
  for (const Impl::Bucket& bucket : my.buckets) {
    kernels()[size_t(bucket.rule)].launch[bucket.kernel]({my.tensors.device(), my.chunks.device() + bucket.first,
                                                          my.strides.device(), my.scalars.device(), my.control.device(),
                                                          bucket.count, use.stream, noting});
    ++my.launches;
  }
  if (noting != nullptr && plan->size() > 0) {
    launch(&fold_statistics_kernel, plan->size(), kThreads, use.stream,
           static_cast<const StatisticsJob*>(my.statistics_jobs.device()),
           static_cast<const double*>(my.statistics.device()), static_cast<const Control*>(my.control.device()),
           step.extras.sums);
    ++my.launches;
  }
  if (!step.extras.only) plan->count_step();
}

void CudaExecutor::norm(const Plan& plan, const std::vector<GroupRow>& groups, const DeviceStep& step) {
  Impl& my = *impl_;
  require_current(my.device);
  const RelaxedCapture relaxed;
  const Use use = my.use_of(step.stream);
  my.cut(plan, my.notes);
  my.describe(plan, groups, true);
  my.upload_tensors(use);
  my.measure(plan, step.clip, use);
}

CudaExecutor::CudaExecutor(int device) : impl_(std::make_unique<Impl>(device)) {}

CudaExecutor::~CudaExecutor() = default;

int CudaExecutor::launches() const { return impl_->launches; }

bool CudaExecutor::was_captured() const { return impl_->was_captured; }

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
