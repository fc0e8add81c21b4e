// See link.h. Host code alone, compiled with the CUDA sources.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/statistics.h"
#include "cuda/tables.h"
#include "offload/job.h"
#include "offload/link.h"
#include "offload/memory_operations.h"

namespace precond {
namespace {

// A step's gradients come in about so many pieces, so that what does not overlap, the first download and the last
// upload, is a small part of it; the driver keeps some thousand things that were enqueued before it blocks the caller.
constexpr size_t kPieces = 32;
constexpr size_t kSmallestPiece = size_t(2) << 20;
// What a thread takes at a time: kMinChunk in plan.h says why not less.
constexpr int64_t kPart = 131072;
// A slot has at least a block of the statistics, of the widest elements.
constexpr size_t kSmallestSlot = size_t(kNormBlock) * sizeof(float);
// How long a wait lasts before the device is asked whether it still works.
constexpr std::chrono::milliseconds kPatience{500};

// Streams are kept for the next link of a device: the allocator may still know one that a gradient was used on.
struct Streams {
  std::mutex mutex;
  std::multimap<int, cudaStream_t> unused;
  static Streams& of_process() {
    static Streams& all = *new Streams;
    return all;
  }
  cudaStream_t take(int device) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (const auto found = unused.find(device); found != unused.end()) {
      const cudaStream_t stream = found->second;
      return unused.erase(found), stream;
    }
    cudaStream_t stream;
    PRECOND_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
  }
  void give(int device, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    unused.emplace(device, stream);
  }
};
cudaEvent_t new_event() {
  cudaEvent_t event;
  PRECOND_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

}  // namespace

// A job, what its stream has done once its parameters are on the device, and what lives until then.
struct Submitted {
  std::shared_ptr<Job> job;
  cudaEvent_t uploaded;
  std::shared_ptr<void> held;
};

struct Link::Impl {
  Impl(int device_number, size_t largest_slot)
      : device(device_number),
        largest(std::max(in_lines(largest_slot), kSmallestSlot)),
        flags(sizeof(Flag) * 2 * kSlots),
        reads(Streams::of_process().take(device_number)),
        writes(Streams::of_process().take(device_number)) {
    std::memset(flags.data(), 0, flags.bytes());
  }
  ~Impl() {
    for (const Submitted& each : jobs) until_done(*each.job);
    auto mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    bool work = true;  // what writes reads p on the host
    for (const cudaStream_t own : {reads, writes}) work = cudaStreamSynchronize(own) == cudaSuccess && work;
    cudaThreadExchangeStreamCaptureMode(&mode);
    for (const cudaStream_t own : {reads, writes})
      if (work) Streams::of_process().give(device, own);
    for (const Submitted& each : jobs) events.push_back(each.uploaded);
    for (const cudaEvent_t event : events) discard_event(event);
  }

  Flag& arrived(size_t slot) { return static_cast<Flag*>(flags.data())[2 * slot]; }
  Flag& updated(size_t slot) { return static_cast<Flag*>(flags.data())[2 * slot + 1]; }
  char* slot(size_t number) { return static_cast<char*>(slots->data()) + number * (sizeof(Verdict) + slot_bytes); }

  // Only whoever waits asks the device: the host's threads call nothing that could wait for it.
  void until_done(Job& job) {
    while (!job.is_done_within(kPatience)) {
      const RelaxedCapture relaxed;
      const cudaError_t answer = cudaStreamQuery(reads);
      cudaGetLastError();
      if (answer == cudaSuccess || answer == cudaErrorNotReady) continue;
      try {
        check(answer, "cudaStreamQuery");
      } catch (...) {
        job.fail(std::current_exception());
      }
    }
  }
  // Lets go of the first jobs, as far as they are done and their parameters on the device; throws an error of theirs.
  void forget_done() {
    while (!jobs.empty() && jobs.front().job->done()) {
      jobs.front().job->rethrow();
      if (!is_uploaded(jobs.front())) return;
      events.push_back(jobs.front().uploaded);
      const Submitted gone = std::move(jobs.front());
      jobs.pop_front();
    }
  }
  static bool is_uploaded(const Submitted& each) {
    try {
      return is_done(each.uploaded);
    } catch (...) {
      if (!each.job->failed) throw;
      return true;  // a device that failed copies nothing
    }
  }
  void wait() {
    for (const Submitted& each : jobs) until_done(*each.job);
    for (const Submitted& each : jobs) each.job->rethrow();
    if (jobs.empty()) return;
    const RelaxedCapture relaxed;
    PRECOND_CUDA_CHECK(cudaStreamSynchronize(writes));  // a piece at most
    forget_done();
  }
  cudaEvent_t take_event() {
    if (events.empty()) return new_event();
    const cudaEvent_t event = events.back();
    return events.pop_back(), event;
  }

  void make_room_for(size_t bytes) {
    if (bytes <= slot_bytes) return;
    wait();
    slot_bytes = 0;
    slots = std::make_unique<Pinned>(kSlots * (sizeof(Verdict) + bytes));
    slot_bytes = bytes;
  }

  std::shared_ptr<Job> describe(const HostStep& step, std::vector<Operand>* devices);
  std::vector<Cut> cut(const Job& job, const std::vector<Operand>& devices);
  void download(const Cut& cut, const HostStep& step, uint32_t ticket, bool is_first);
  void upload(const Cut& cut, uint32_t ticket);

  const int device;
  const size_t largest;
  std::recursive_mutex calls;  // of several threads; what is let go may call too
  Pinned flags;
  std::unique_ptr<Pinned> slots;
  size_t slot_bytes = 0;  // of gradients in each, behind a Verdict
  cudaStream_t reads, writes;
  std::vector<cudaEvent_t> events;  // not in use
  uint32_t tickets = 0;             // of pieces so far
  std::deque<Submitted> jobs;       // that are not done, or whose parameters are not on the device
  Workers workers;                  // the last member: its threads end before what they use
};

// What the job needs of the plan, and of each of its tensors p on the device and g.
std::shared_ptr<Job> Link::Impl::describe(const HostStep& step, std::vector<Operand>* devices) {
  auto job = std::make_shared<Job>();
  job->scalars = step.plan->fill_scalars(*step.groups, step.extras.factors);
  job->strides = step.plan->all_strides();
  job->updates = update_table();
  job->control = {step.grad_coef, 0.0f, step.clip_value};
  job->clip = step.clip;
  job->clip.grad_norm = job->clip.clip_coef = nullptr;
  job->clip.skipped = nullptr;
  job->reads_scale = step.grad_scale != nullptr;
  job->reads_inf = step.found_inf != nullptr;
  job->only = step.extras.only;
  std::vector<int64_t> block_of;
  if (step.extras.sums != nullptr) {
    block_of = statistic_blocks(*step.plan);
    job->table.resize(size_t(block_of.back()) * kBlockStatistics);
  }
  for (int64_t i = 0; i < step.plan->size(); ++i) {
    const Tensor& t = step.plan->tensor(i);
    if (!t.active) continue;
    if (t.step) job->counted.push_back({t.step, t.next_step});
    if (t.scalar) job->counted.push_back({t.scalar, t.next_scalar});
    if (t.numel == 0) continue;
    if (t.p.strides != kDense || t.g.strides != kDense || step.params[size_t(i)] == nullptr)
      throw std::invalid_argument("a tensor that the host updates must be dense in its visiting order");
    job->tensors.push_back(t);
    job->signs.push_back((*step.groups)[size_t(t.group)].sign);
    if (!block_of.empty()) job->block_of.push_back(block_of[size_t(i)]);
    devices->push_back({static_cast<char*>(step.params[size_t(i)]), t.p.format});
  }
  return job;
}

// Tensors in the plan's order; all pieces but the last have about the same size.
std::vector<Cut> Link::Impl::cut(const Job& job, const std::vector<Operand>& devices) {
  size_t total = 0;
  for (const Tensor& t : job.tensors) total += in_lines(size_t(t.numel) * item_bytes(t.g));
  const size_t wanted = in_lines(total / kPieces);
  const size_t bytes = std::min(std::max(wanted, kSmallestPiece), largest);
  make_room_for(std::min(bytes, std::max(in_lines(total), kSmallestSlot)));
  const int64_t align = job.table.empty() ? kChunkAlign : kNormBlock;
  std::vector<Cut> cuts;
  for (size_t k = 0; k < job.tensors.size(); ++k) {
    const Tensor& t = job.tensors[k];
    const size_t item = item_bytes(t.g), p_item = item_bytes(t.p);
    for (int64_t begin = 0; begin < t.numel;) {
      const int64_t rest = t.numel - begin;
      const int64_t room = cuts.empty() ? 0 : int64_t((std::min(bytes, slot_bytes) - cuts.back().used) / item);
      const int64_t count = rest <= room ? rest : room / align * align;
      if (count == 0) {
        cuts.emplace_back();
        continue;
      }
      Cut& cut = cuts.back();
      cut.downloads.push_back({cut.used, t.g.data + size_t(begin) * item, size_t(count) * item});
      if (!job.only)
        cut.uploads.push_back(
            {devices[k].data + size_t(begin) * p_item, t.p.data + size_t(begin) * p_item, size_t(count) * p_item});
      for (int64_t part = 0; part < count; part += kPart)
        cut.parts.push_back({int32_t(k), begin + part, std::min(kPart, count - part), cut.used + size_t(part) * item});
      cut.used += in_lines(size_t(count) * item);
      begin += count;
    }
  }
  return cuts;
}

void Link::Impl::download(const Cut& cut, const HostStep& step, uint32_t ticket, bool is_first) {
  char* const own = slot(ticket % kSlots);
  const MemoryOperations& memory = MemoryOperations::of_process();
  memory.wait(reads, &updated(ticket % kSlots).value, ticket - kSlots);
  const auto number = [&](void* to, const void* from, size_t bytes) {
    if (from != nullptr) PRECOND_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, reads));
  };
  if (is_first) {
    auto* const verdict = reinterpret_cast<Verdict*>(own);
    number(&verdict->total, step.clip.total, sizeof verdict->total);
    number(&verdict->grad_scale, step.grad_scale, sizeof verdict->grad_scale);
    number(&verdict->found_inf, step.found_inf, sizeof verdict->found_inf);
  }
  for (const Download& copy : cut.downloads)
    PRECOND_CUDA_CHECK(
        cudaMemcpyAsync(own + sizeof(Verdict) + copy.at, copy.from, copy.bytes, cudaMemcpyDeviceToHost, reads));
  memory.write(reads, &arrived(ticket % kSlots).value, ticket);
}

void Link::Impl::upload(const Cut& cut, uint32_t ticket) {
  if (cut.uploads.empty()) return;
  MemoryOperations::of_process().wait(writes, &updated(ticket % kSlots).value, ticket);
  for (const Upload& copy : cut.uploads)
    PRECOND_CUDA_CHECK(cudaMemcpyAsync(copy.to, copy.from, copy.bytes, cudaMemcpyHostToDevice, writes));
}

Link::Link(int device, size_t slot) {
  require_current(device);
  const RelaxedCapture relaxed;
  MemoryOperations::of_process();
  impl_ = std::make_unique<Impl>(device, slot);
}

Link::~Link() = default;

std::shared_ptr<HostJob> Link::submit(const HostStep& step) {
  Impl& my = *impl_;
  const std::lock_guard<std::recursive_mutex> lock(my.calls);
  require_current(my.device);
  const RelaxedCapture relaxed;
  const auto stream = reinterpret_cast<cudaStream_t>(step.stream);
  if (is_capturing(stream))
    throw std::runtime_error("offload must be None for a step that is captured into a graph: the host has its states");
  Discarded::of_process().free_all();
  my.forget_done();

  std::vector<Operand> devices;
  const std::shared_ptr<Job> job = my.describe(step, &devices);
  std::vector<Cut> cuts = my.cut(*job, devices);
  const size_t count = cuts.size();
  job->pieces_left = int64_t(count);
  if (count == 0) {
    job->end();
    return job;
  }
  const cudaEvent_t event = my.take_event();
  my.jobs.push_back({job, event, step.held});
  const uint32_t first = my.tickets + 1;
  size_t enqueued = 0;
  try {
    PRECOND_CUDA_CHECK(cudaEventRecord(event, stream));
    for (const cudaStream_t own : {my.reads, my.writes}) PRECOND_CUDA_CHECK(cudaStreamWaitEvent(own, event, 0));
    // Uploads are kSlots - 1 pieces behind downloads: also where a driver makes one queue of all streams
    // (CUDA_DEVICE_MAX_CONNECTIONS=1), a download is then not behind the upload of the piece before it.
    for (size_t k = 0; k < count + kSlots - 1; ++k) {
      if (k < count) {
        const uint32_t ticket = first + uint32_t(k);
        const size_t slot = ticket % kSlots;
        my.tickets = ticket;
        my.download(cuts[k], step, ticket, k == 0);
        my.workers.add(std::make_shared<SomeGradients>(job, std::move(cuts[k].parts), my.slot(slot), k == 0,
                                                       &my.arrived(slot), &my.updated(slot), ticket),
                       step.threads);
        ++enqueued;
      }
      if (k >= kSlots - 1) my.upload(cuts[k - (kSlots - 1)], first + uint32_t(k - (kSlots - 1)));
    }
    PRECOND_CUDA_CHECK(cudaEventRecord(event, my.writes));
  } catch (...) {
    job->fail(nullptr);
    cudaEventRecord(event, my.writes);                   // behind what was enqueued
    if (my.tickets != first + uint32_t(enqueued) - 1) {  // a piece whose threads never heard of it
      for (const Submitted& each : my.jobs)
        if (each.job != job) my.until_done(*each.job);
      Flag& flag = my.updated(my.tickets % kSlots);
      while (!flag.has_reached(my.tickets - kSlots)) std::this_thread::yield();
      flag.set(my.tickets);
    }
    const auto rest = int64_t(count - enqueued);
    if (rest > 0 && job->pieces_left.fetch_sub(rest) == rest) job->end();
    throw;
  }
  if (!job->only)
    for (int64_t i = 0; i < step.plan->size(); ++i)
      if (step.plan->tensor(i).active) step.plan->tensor(i).fresh = false;
  if (step.extras.sums != nullptr) {
    my.until_done(*job);
    job->rethrow();
    if (job->control.skip == 0.0f)
      fold_statistics(*step.plan, statistic_blocks(*step.plan), job->table.data(), step.extras.sums);
  }
  return job;
}

void Link::join(uintptr_t handle) {
  Impl& my = *impl_;
  const std::lock_guard<std::recursive_mutex> lock(my.calls);
  require_current(my.device);
  const cudaEvent_t event = my.take_event();
  my.events.push_back(event);  // a wait is for what it was when that was enqueued
  PRECOND_CUDA_CHECK(cudaEventRecord(event, my.writes));
  PRECOND_CUDA_CHECK(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(handle), event, 0));
}

void Link::wait() {
  const std::lock_guard<std::recursive_mutex> lock(impl_->calls);
  impl_->wait();
  const RelaxedCapture relaxed;
  Discarded::of_process().free_all();
}

void Link::wait_for(const std::shared_ptr<HostJob>& job) {
  impl_->until_done(static_cast<Job&>(*job));
  static_cast<Job&>(*job).rethrow();
}

uintptr_t Link::reads() const { return reinterpret_cast<uintptr_t>(impl_->reads); }

}  // namespace precond
