// The host's part of offloaded steps, on the emulated runtime: the bits of the CPU backend, what overlaps by what was
// enqueued, and what goes wrong. Built with AddressSanitizer and UndefinedBehaviorSanitizer, and once with
// ThreadSanitizer.
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>

#include "any.h"
#include "cpu/norm.h"
#include "cpu/update.h"
#include "offload/link.h"
#include "offload/workers.h"
#include "schedule.h"

namespace {

constexpr size_t kSlot = 32768;
const Format F = Format::fp32, B = Format::bf16;

// A tensor whose p the host has in pinned memory and the device in its own.
struct Shared {
  std::unique_ptr<Any> any;
  std::unique_ptr<Pinned> host;
  std::vector<char> device;

  Shared(int rule, int64_t n, Format p, Format g, const std::vector<Format>& states, unsigned seed)
      : any(make(rule, n, p, g, states, 0, seed)) {
    const size_t bytes = size_t(n) * size_t(item_bits(p)) / 8;
    host = std::make_unique<Pinned>(bytes);
    Tensor& t = any->tensor;
    if (bytes > 0) std::memcpy(host->data(), t.p.data, bytes);
    device.assign(t.p.data, t.p.data + bytes);
    t.p.data = static_cast<char*>(host->data());
  }
};

struct Case {
  std::vector<Shared> tensors;
  Plan plan;
  std::vector<void*> params;

  void add(Shared shared) {
    tensors.push_back(std::move(shared));
    plan.add(tensors.back().any->tensor);
    params.push_back(tensors.back().device.data());
  }
};

void fill(Case* all, Plan* plain, std::vector<std::unique_ptr<Any>>* theirs, int rule, Format p, Format g,
          const std::vector<Format>& states) {
  unsigned seed = 0;
  for (const int64_t n : {int64_t(0), int64_t(1), int64_t(63), int64_t(70001), int64_t(256), int64_t(40000)}) {
    all->add(Shared(rule, n, p, g, states, ++seed));
    theirs->push_back(make(rule, n, p, g, states, 0, seed));
    plain->add(theirs->back()->tensor);
  }
}

HostStep step_of(Case* all, const std::vector<GroupRow>* groups, int threads = 2) {
  HostStep step;
  step.plan = &all->plan;
  step.groups = groups;
  step.params = all->params;
  step.threads = threads;
  return step;
}

void same(const Case& ours, const std::vector<std::unique_ptr<Any>>& theirs) {
  for (size_t i = 0; i < theirs.size(); ++i) {
    const Any& a = *ours.tensors[i].any;
    const Any& b = *theirs[i];
    CHECK(a.step == b.step && a.scalar == b.scalar);
    const size_t bytes = size_t(b.tensor.numel) * size_t(item_bits(b.tensor.p.format)) / 8;
    if (bytes == 0) continue;
    CHECK(std::memcmp(a.tensor.p.data, b.tensor.p.data, bytes) == 0);
    CHECK(std::memcmp(ours.tensors[i].device.data(), b.tensor.p.data, bytes) == 0);
    // All memory but p's, which is elsewhere: made in the same order.
    for (size_t k = 1; k < b.memory.size(); ++k)
      if (b.memory[k].first.size > 0 && a.memory[k].first.data.get() != nullptr && b.tensor.p.beside == nullptr)
        CHECK(std::memcmp(a.memory[k].first.data.get(), b.memory[k].first.data.get(), size_t(b.memory[k].first.size)) ==
              0);
  }
}

void every_format_has_the_bits_of_the_cpu() {
  const std::vector<std::pair<std::pair<Format, Format>, std::vector<Format>>> mixes = {
      {{F, F}, {F}}, {{B, B}, {F}}, {{B, F}, {B}}, {{B, B}, {Format::int8, Format::uint8}}};
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  for (const auto& mix : mixes) {
    Case ours;
    Plan plain;
    std::vector<std::unique_ptr<Any>> theirs;
    fill(&ours, &plain, &theirs, rule, mix.first.first, mix.first.second, mix.second);
    Link link(0, kSlot);
    for (int step = 0; step < 3; ++step) {
      const auto job = link.submit(step_of(&ours, &groups));
      link.wait_for(job);
      link.join(0);
      run_on_cpu(&plain, groups, Control{}, 1);
    }
    link.wait();
    same(ours, theirs);
  }
}

// What a device says of a step is there before the first update.
void the_device_decides() {
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  for (const bool overflow : {false, true}) {
    Case ours;
    Plan plain;
    std::vector<std::unique_ptr<Any>> theirs;
    fill(&ours, &plain, &theirs, rule, B, B, {F});
    const float scale = 1024.0f, inf = overflow ? 1.0f : 0.0f;
    double total = 0.0;
    HostStep step = step_of(&ours, &groups);
    step.grad_scale = &scale;
    step.found_inf = &inf;
    step.clip.total = &total;
    step.clip.max_norm = 1e-3f;
    Clip clip = step.clip;
    double measured = 0.0;
    clip.total = &measured;
    measure_on_cpu(plain, clip, 1);
    total = measured;
    Link link(0, kSlot);
    link.submit(step);
    link.wait();
    link.join(0);
    Control control{float(1.0 / 1024.0), inf, HUGE_VALF};
    finish(clip, &control);
    run_on_cpu(&plain, groups, control, 1);
    CHECK(theirs[1]->step == (overflow ? 0.0f : 1.0f));
    same(ours, theirs);
  }
}

void statistics_are_those_of_the_cpu() {
  const int rule = rule_number("adamw+parts");
  const std::vector<GroupRow> groups{group_of(rule)};
  Case ours;
  Plan plain;
  std::vector<std::unique_ptr<Any>> theirs;
  fill(&ours, &plain, &theirs, rule, B, B, {F});
  for (int64_t i = 0; i < plain.size(); ++i) ours.plan.tensor(i).number = plain.tensor(i).number = int32_t(i);
  std::vector<double> a(size_t(plain.size()) * kStatistics), b = a;
  HostStep step = step_of(&ours, &groups);
  step.extras.sums = a.data();
  Link link(0, kSlot);
  for (const bool only : {true, false}) {
    step.extras.only = only;
    link.submit(step);
    link.join(0);
    Extras extras;
    extras.sums = b.data();
    extras.only = only;
    run_on_cpu(&plain, groups, Control{}, 1, extras);
    CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0);
    same(ours, theirs);
  }
}

void copies_overlap_the_update() {
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  Case all;
  const int64_t n = 400000;
  all.add(Shared(rule, n, B, B, {F}, 1));
  Link link(0, kSlot);
  const std::vector<Traced> trace = traced([&] {
    link.submit(step_of(&all, &groups));
    link.wait();
    link.join(0);
  });
  size_t down = 0, up = 0;
  for (const Traced& item : trace) {
    down += item.kind == Kind::kDownload ? item.value : 0;
    up += item.kind == Kind::kUpload ? item.value : 0;
  }
  CHECK(down == size_t(2 * n) && up == size_t(2 * n));  // 4 bytes a parameter
  const Times times = simulate(trace, 0);
  CHECK(times.together < 0.45 * times.one_by_one);  // a third, and what begins and ends it
  // The same work by a loop that waits for each piece.
  std::vector<Traced> loop;
  for (uint32_t ticket = 1; ticket <= 8; ++ticket)
    for (const Traced item :
         {Traced{Kind::kDownload, &loop, nullptr, 1000}, Traced{Kind::kWriteNumber, &loop, &link, ticket},
          Traced{Kind::kWaitForNumber, &loop, &loop, ticket}, Traced{Kind::kUpload, &loop, nullptr, 1000}})
      loop.push_back(item);
  const Times slow = simulate(loop, 0);
  CHECK(slow.together == slow.one_by_one);
}

cuda_on_host::Engine* engine_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream)->engine.get(); }

// A busy device holds nobody up: neither the caller, nor the work of its stream between two tensors.
void the_caller_goes_on_while_the_device_is_busy() {
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  Case first, second;
  first.add(Shared(rule, 100000, B, B, {F}, 1));
  second.add(Shared(rule, 50000, B, B, {F}, 2));
  Link link(0, kSlot);
  engine_of(link.reads())->hold(true);
  cudaStream_t stream = nullptr;
  std::vector<std::shared_ptr<HostJob>> jobs;
  const std::vector<Traced> trace = traced([&] {
    for (Case* each : {&first, &second}) {
      jobs.push_back(link.submit(step_of(each, &groups)));
      CHECK(!jobs.back()->done());
      CHECK(cuda_on_host::launch_kernel(+[](float*) {}, 1, 1, stream, static_cast<float*>(nullptr)) == cudaSuccess);
    }
    CHECK(first.tensors[0].any->step == 0.0f);
    engine_of(link.reads())->hold(false);
    link.join(0);
  });
  const cuda_on_host::Stream* own = cuda_on_host::stream_of(stream);
  std::vector<Kind> of_caller;
  for (const Traced& item : trace)
    if (item.stream == own) of_caller.push_back(item.kind);
  CHECK((of_caller ==
         std::vector<Kind>{Kind::kRecord, Kind::kKernel, Kind::kRecord, Kind::kKernel, Kind::kWaitForEvent}));
  link.wait();
  CHECK(jobs[0]->done() && jobs[1]->done() && first.tensors[0].any->step == 1.0f);
}

void errors_come_with_the_next_call() {
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  Case all;
  all.add(Shared(rule, 100000, B, B, {F}, 1));
  Link link(0, kSlot);
  engine_of(link.reads())->hold(true);
  link.submit(step_of(&all, &groups));
  engine_of(link.reads())->error = cudaErrorIllegalAddress;
  CHECK(fails([&] { link.wait(); }) == 1);
  link.wait();  // once
  CHECK(all.tensors[0].any->step == 0.0f);
  engine_of(link.reads())->hold(false);
  CHECK(fails([&] { link.submit(step_of(&all, &groups)); }) == 1);  // a stream that failed fails for ever
  link.wait();
  CHECK(all.tensors[0].any->step == 0.0f);
  cudaGetLastError();
}

// A step that was enqueued in part keeps what that part needs.
void what_fails_lives_until_its_copies_are_done() {
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  Case all, second, third;
  for (Case* each : {&all, &all, &second, &third}) each->add(Shared(rule, 100000, B, B, {F}, 1));
  CHECK(cudaSetDevice(1) == cudaSuccess);
  CHECK(cudaMalloc(&all.params[1], 200000) == cudaSuccess);  // no copy of device 0 may reach it
  cudaStream_t elsewhere;
  CHECK(cudaStreamCreate(&elsewhere) == cudaSuccess);
  CHECK(cudaSetDevice(0) == cudaSuccess);
  Link link(0, kSlot);
  const auto hold_uploads = [&](bool held) {
    const cuda_on_host::Lock lock(cuda_on_host::runtime().mutex);
    cuda_on_host::each_stream([&](cuda_on_host::Stream* stream) {
      if (stream->engine != nullptr && stream->engine.get() != engine_of(link.reads())) stream->engine->hold(held);
    });
  };
  hold_uploads(true);
  const auto held = std::make_shared<int>();
  {
    HostStep step = step_of(&all, &groups);
    step.held = held;
    CHECK(fails([&] { link.submit(step); }) == 1);
    step.held = nullptr;
    step.stream = reinterpret_cast<uintptr_t>(elsewhere);
    CHECK(fails([&] { link.submit(step); }) == 1);  // of which nothing was enqueued: nobody waits for it
  }
  link.wait_for(link.submit(step_of(&second, &groups)));  // behind which the first one is done
  link.submit(step_of(&third, &groups));
  CHECK(held.use_count() == 2);
  hold_uploads(false);
  link.wait();
  CHECK(held.use_count() == 1 && second.tensors[0].any->step == 1.0f && third.tensors[0].any->step == 1.0f);
  CHECK(cudaFree(all.params[1]) == cudaSuccess);
}

void a_capture_is_refused() {
  const int rule = rule_number("adamw");
  const std::vector<GroupRow> groups{group_of(rule)};
  Case all;
  all.add(Shared(rule, 100, B, B, {F}, 1));
  Link link(0, kSlot);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess);
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  HostStep step = step_of(&all, &groups);
  step.stream = reinterpret_cast<uintptr_t>(stream);
  CHECK(fails([&] { link.submit(step); }) == 1);
  cudaGraph_t graph;
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  cuda_on_host::destroy(graph);
  link.submit(step_of(&all, &groups));
  link.wait();
}

struct Counting : Piece {
  Counting(int64_t parts, std::vector<std::atomic<int>>* counts, std::atomic<int>* order, int number, bool throws)
      : Piece(parts), counts_(counts), order_(order), number_(number), throws_(throws) {}
  bool is_there() override { return looks_++ > 10; }
  void run(int64_t part) override {
    ++(*counts_)[size_t(part)];
    if (throws_ && part == 3) throw std::runtime_error("part 3");
  }
  void finish(std::exception_ptr error) override {
    CHECK((error != nullptr) == throws_);
    order_->fetch_add(number_);
  }
  std::atomic<int> looks_{0};
  std::vector<std::atomic<int>>* counts_;
  std::atomic<int>* order_;
  int number_;
  bool throws_;
};

void workers_run_each_part_once() {
  std::vector<std::atomic<int>> counts(100);
  std::atomic<int> finished{0};
  {
    Workers workers;
    for (int i = 0; i < 20; ++i)
      workers.add(std::make_shared<Counting>(100, &counts, &finished, 1, i % 7 == 3), 1 + i % 4);
  }
  CHECK(finished == 20);
  for (const auto& count : counts) CHECK(count == 20);
}

// The processors that this thread may run on.
std::vector<int> processors() {
  std::vector<int> found;
  cpu_set_t mask;
  CHECK(sched_getaffinity(0, sizeof mask, &mask) == 0);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &mask)) found.push_back(cpu);
  return found;
}

void threads_have_a_processor_each() {
  const std::vector<int> all = processors();
  for (int turn = 0; turn < 2; ++turn) {  // what a thread had is free after it
    std::vector<int> seen;
    const std::function<void(size_t)> more = [&](size_t i) {
      std::thread([&] {
        const OnOwnProcessor own;
        CHECK(own.is_alone() == (i < all.size()));
        if (!own.is_alone()) {
          CHECK(processors() == all);
          return;
        }
        CHECK(processors().size() == 1);
        seen.push_back(processors()[0]);
        more(i + 1);
      }).join();
    };
    more(0);
    CHECK(seen == all);
  }
  if (all.size() < std::thread::hardware_concurrency()) return;  // a launcher has bound this process
  setenv("LOCAL_WORLD_SIZE", "2", 1);
  std::thread([&] { CHECK(!OnOwnProcessor().is_alone() && processors() == all); }).join();
  unsetenv("LOCAL_WORLD_SIZE");
}

}  // namespace

int main() {
  threads_have_a_processor_each();
  workers_run_each_part_once();
  every_format_has_the_bits_of_the_cpu();
  the_device_decides();
  statistics_are_those_of_the_cpu();
  copies_overlap_the_update();
  the_caller_goes_on_while_the_device_is_busy();
  errors_come_with_the_next_call();
  what_fails_lives_until_its_copies_are_done();
  a_capture_is_refused();
  std::printf("all passed\n");
}
