// See link.h. Host code alone, compiled with the CUDA sources.
#ifndef PRECOND_ISA
#define PRECOND_ISA cuda
#endif
#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/statistics.h"
#include "cuda/tables.h"
#include "offload/link.h"
#include "offload/memory_operations.h"
#include "offload/workers.h"

namespace precond {
namespace {

constexpr int kSlots = 4;
// A step's gradients come in about so many pieces, so that what does not overlap, the first download and the last
// upload, is a small part of it; the driver keeps some thousand things that were enqueued before it blocks the caller.
constexpr size_t kPieces = 32;
constexpr size_t kSmallestPiece = size_t(2) << 20;
// What a thread takes at a time: kMinChunk in plan.h says why not less.
constexpr int64_t kPart = 131072;
constexpr size_t kLine = 64;
// A slot has at least a block of the statistics, of the widest elements.
constexpr size_t kSmallestSlot = size_t(kNormBlock) * sizeof(float);
// After so many looks at a flag, 50 us apart, the device is asked whether it still works.
constexpr int kLooksBeforeAsking = 20000;

size_t item_bytes(const Operand& operand) { return size_t(item_bits(operand.format)) / 8; }
size_t in_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// What a device has said of a step, at the head of the slot of its first piece.
struct alignas(kLine) Verdict {
  double total;
  float grad_scale, found_inf;
};

// A number that streams and threads both read and write, alone in its line.
struct alignas(kLine) Flag {
  uint32_t value;
  bool has_reached(uint32_t at) const { return int32_t(__atomic_load_n(&value, __ATOMIC_ACQUIRE) - at) >= 0; }
  void set(uint32_t to) {
    std::atomic_thread_fence(std::memory_order_seq_cst);  // what was written is there for a device before the flag
    __atomic_store_n(&value, to, __ATOMIC_RELEASE);
  }
};

struct Counted {
  Number number;
  double next;
};

class Job : public HostJob {
 public:
  std::vector<Tensor> tensors;
  std::vector<Strides> strides;
  std::vector<float> scalars;
  std::vector<float> signs;  // of each tensor
  std::vector<Counted> counted;
  const UpdateChunk* updates = nullptr;  // by number of the rule
  Control control;
  Clip clip;
  bool reads_scale = false, reads_inf = false, only = false;
  std::vector<int64_t> block_of;  // of each tensor, and a row of `table` for each block: with statistics
  std::vector<double> table;
  std::atomic<int64_t> pieces_left{0};
  std::once_flag begun;
  std::atomic<bool> failed{false};

  // What every piece does first, once: the control, from what the device has said.
  void begin(const Verdict& verdict) {
    std::call_once(begun, [&] {
      if (reads_scale) control.grad_coef = float(1.0 / double(verdict.grad_scale)) * control.grad_coef;
      if (reads_inf && verdict.found_inf != 0.0f) control.skip = 1.0f;
      double total = verdict.total;
      if (clip.total != nullptr) clip.total = &total;
      precond::finish(clip, &control);
    });
  }
  void end(std::exception_ptr error) {
    if (error == nullptr && control.skip == 0.0f && !only)
      for (const Counted& c : counted) write_number(c.number.data, c.number.type, c.next);
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = std::move(error);
    done_ = true;
    changed_.notify_all();
  }
  void note(std::exception_ptr error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (noted_ == nullptr) noted_ = std::move(error);
    failed = noted_ != nullptr;
  }
  std::exception_ptr noted() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return noted_;
  }
  bool done() const override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }
  void wait() override {
    until_done();
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const std::exception_ptr error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
  }
  void until_done() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return done_; });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::exception_ptr noted_, error_;
};

// Elements of one tensor, and where in its slot the first of them has its gradient.
struct Part {
  int32_t tensor;  // of the job
  int64_t begin, count;
  size_t at;
};

struct Download {
  size_t at;  // in the slot
  const char* from;
  size_t bytes;
};
struct Upload {
  char* to;
  const char* from;
  size_t bytes;
};

// What one slot holds at a time.
struct Cut {
  std::vector<Part> parts;
  std::vector<Download> downloads;
  std::vector<Upload> uploads;
  size_t used = 0;
};

class SomeGradients : public Piece {
 public:
  // slot: a Verdict, in a job's first piece, and gradients.
  SomeGradients(std::shared_ptr<Job> job, std::vector<Part> parts, const char* slot, bool is_first, const Flag* arrived,
                Flag* updated, uint32_t ticket, int device, cudaStream_t reads)
      : Piece(int64_t(parts.size())),
        job_(std::move(job)),
        parts_(std::move(parts)),
        slot_(slot),
        is_first_(is_first),
        arrived_(arrived),
        updated_(updated),
        ticket_(ticket),
        device_(device),
        reads_(reads) {}

  bool is_there() override {
    if (arrived_->has_reached(ticket_) || job_->failed) {
      if (!job_->failed && is_first_) job_->begin(*reinterpret_cast<const Verdict*>(slot_));
      return true;
    }
    thread_local int looks = 0;
    if (++looks % kLooksBeforeAsking == 0) ask();
    return false;
  }

  void run(int64_t number) override {
    if (job_->failed) return;
    const Part& part = parts_[size_t(number)];
    Tensor tensor = job_->tensors[size_t(part.tensor)];
    // As if all of the gradient were there: kernels ask for elements by their numbers.
    const auto first = reinterpret_cast<uintptr_t>(slot_ + sizeof(Verdict) + part.at);
    tensor.g.data = reinterpret_cast<char*>(first - uintptr_t(part.begin) * item_bytes(tensor.g));
    double* statistics = nullptr;
    if (!job_->table.empty())
      statistics =
          &job_->table[size_t(job_->block_of[size_t(part.tensor)] + part.begin / kNormBlock) * kBlockStatistics];
    job_->updates[tensor.rule]({&tensor, job_->strides.data(), &job_->scalars[size_t(tensor.scalars) * kScalarFloats],
                                &job_->control, job_->signs[size_t(part.tensor)], part.begin, part.count, statistics,
                                job_->only});
  }

  void finish(std::exception_ptr error) override {
    if (error != nullptr) job_->note(std::move(error));
    updated_->set(ticket_);
    if (job_->pieces_left.fetch_sub(1) == 1) job_->end(job_->noted());
  }

 private:
  // Throws if the device has failed. This thread is the link's own: it may choose its device, and else the runtime
  // would make a context on GPU 0.
  void ask() const {
    const RelaxedCapture relaxed;
    PRECOND_CUDA_CHECK(cudaSetDevice(device_));
    const cudaError_t answer = cudaStreamQuery(reads_);
    if (answer != cudaErrorNotReady) check(answer, "cudaStreamQuery");
    cudaGetLastError();
  }

  const std::shared_ptr<Job> job_;
  const std::vector<Part> parts_;
  const char* const slot_;
  const bool is_first_;
  const Flag* const arrived_;
  Flag* const updated_;
  const uint32_t ticket_;
  const int device_;
  const cudaStream_t reads_;
};

// What is pinned, for Pinned::has.
struct Blocks {
  std::mutex mutex;
  std::map<const char*, size_t> bytes;
  static Blocks& of_process() {
    static Blocks& all = *new Blocks;
    return all;
  }
};

cudaStream_t new_stream() {
  cudaStream_t stream;
  PRECOND_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return stream;
}
cudaEvent_t new_event() {
  cudaEvent_t event;
  PRECOND_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

}  // namespace

Pinned::Pinned(size_t bytes) : bytes_(bytes) {
  const RelaxedCapture relaxed;
  PRECOND_CUDA_CHECK(cudaHostAlloc(&data_, std::max(bytes, size_t(1)), cudaHostAllocDefault));
  Blocks& blocks = Blocks::of_process();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  blocks.bytes[static_cast<const char*>(data_)] = bytes;
}

Pinned::~Pinned() {
  if (data_ == nullptr) return;
  {
    Blocks& blocks = Blocks::of_process();
    const std::lock_guard<std::mutex> lock(blocks.mutex);
    blocks.bytes.erase(static_cast<const char*>(data_));
  }
  discard_pinned(data_);
}

bool Pinned::has(const void* address) {
  Blocks& blocks = Blocks::of_process();
  const std::lock_guard<std::mutex> lock(blocks.mutex);
  auto found = blocks.bytes.upper_bound(static_cast<const char*>(address));
  if (found == blocks.bytes.begin()) return false;
  --found;
  return static_cast<const char*>(address) < found->first + found->second;
}

struct Link::Impl {
  Impl(int device_number, size_t largest_slot)
      : device(device_number),
        largest(std::max(in_lines(largest_slot), kSmallestSlot)),
        flags(sizeof(Flag) * 2 * kSlots),
        reads(new_stream()),
        writes(new_stream()),
        ready(new_event()),
        written(new_event()) {
    std::memset(flags.data(), 0, flags.bytes());
  }
  ~Impl() {
    for (const std::shared_ptr<Job>& job : jobs) job->until_done();
    auto mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    cudaStreamSynchronize(writes);  // which read p on the host
    cudaStreamDestroy(reads);
    cudaStreamDestroy(writes);
    cudaThreadExchangeStreamCaptureMode(&mode);
    discard_event(ready);
    discard_event(written);
  }

  Flag& arrived(size_t slot) { return static_cast<Flag*>(flags.data())[2 * slot]; }
  Flag& updated(size_t slot) { return static_cast<Flag*>(flags.data())[2 * slot + 1]; }
  char* slot(size_t number) { return static_cast<char*>(slots->data()) + number * (sizeof(Verdict) + slot_bytes); }

  // Lets go of jobs that are done, and throws the first error of theirs.
  void forget_done() {
    std::exception_ptr first;
    std::vector<std::shared_ptr<Job>> others;
    for (const std::shared_ptr<Job>& job : jobs) {
      if (!job->done()) {
        others.push_back(job);
        continue;
      }
      try {
        job->wait();
      } catch (...) {
        if (first == nullptr) first = std::current_exception();
      }
    }
    jobs.swap(others);
    if (first != nullptr) std::rethrow_exception(first);
  }
  void wait() {
    for (const std::shared_ptr<Job>& job : jobs) job->until_done();
    forget_done();
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
  Pinned flags;
  std::unique_ptr<Pinned> slots;
  size_t slot_bytes = 0;  // of gradients in each, behind a Verdict
  cudaStream_t reads, writes;
  cudaEvent_t ready, written;
  uint32_t tickets = 0;  // of pieces so far
  std::vector<std::shared_ptr<Job>> jobs;
  Workers workers;  // the last member: its threads end before what they use
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
  my.jobs.push_back(job);
  if (count == 0) {
    job->end(nullptr);
    return job;
  }
  PRECOND_CUDA_CHECK(cudaEventRecord(my.ready, stream));
  for (const cudaStream_t own : {my.reads, my.writes}) PRECOND_CUDA_CHECK(cudaStreamWaitEvent(own, my.ready, 0));
  const uint32_t first = my.tickets + 1;
  size_t enqueued = 0;
  try {
    // Uploads are kSlots - 1 pieces behind downloads: also where a driver makes one queue of all streams
    // (CUDA_DEVICE_MAX_CONNECTIONS=1), a download is then not behind the upload of the piece before it.
    for (size_t k = 0; k < count + kSlots - 1; ++k) {
      if (k < count) {
        const uint32_t ticket = first + uint32_t(k);
        const size_t slot = ticket % kSlots;
        my.download(cuts[k], step, ticket, k == 0);
        my.workers.add(
            std::make_shared<SomeGradients>(job, std::move(cuts[k].parts), my.slot(slot), k == 0, &my.arrived(slot),
                                            &my.updated(slot), ticket, my.device, my.reads),
            step.threads);
        my.tickets = ticket;
        ++enqueued;
      }
      if (k >= kSlots - 1) my.upload(cuts[k - (kSlots - 1)], first + uint32_t(k - (kSlots - 1)));
    }
  } catch (...) {
    job->failed = true;
    const auto rest = int64_t(count - enqueued);
    if (rest > 0 && job->pieces_left.fetch_sub(rest) == rest) job->end(nullptr);
    throw;
  }
  if (!job->only)
    for (int64_t i = 0; i < step.plan->size(); ++i)
      if (step.plan->tensor(i).active) step.plan->tensor(i).fresh = false;
  if (step.extras.sums != nullptr) {
    job->wait();
    if (job->control.skip == 0.0f)
      fold_statistics(*step.plan, statistic_blocks(*step.plan), job->table.data(), step.extras.sums);
  }
  return job;
}

void Link::join(uintptr_t handle) {
  Impl& my = *impl_;
  require_current(my.device);
  PRECOND_CUDA_CHECK(cudaEventRecord(my.written, my.writes));
  PRECOND_CUDA_CHECK(cudaStreamWaitEvent(reinterpret_cast<cudaStream_t>(handle), my.written, 0));
}

void Link::wait() { impl_->wait(); }

uintptr_t Link::reads() const { return reinterpret_cast<uintptr_t>(impl_->reads); }

}  // namespace precond
