// The CUDA backend against a runtime that says no (tests/cuda_on_host/runtime.h): pending events, captures, replays of
// graphs whose plan is gone, two devices. Built with AddressSanitizer and UndefinedBehaviorSanitizer.
#include <cuda_runtime.h>

#include <functional>
#include <stdexcept>
#include <thread>

#include "any.h"
#include "cuda/executor.h"

namespace {

using cuda_on_host::runtime;
const Format F = Format::fp32, B = Format::bf16;

cudaStream_t new_stream() {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream) == cudaSuccess);
  return stream;
}
DeviceStep on(cudaStream_t stream) {
  DeviceStep step;
  step.stream = reinterpret_cast<uintptr_t>(stream);
  return step;
}

// One tensor on the emulated GPU and its twin on the CPU.
struct Pair {
  Plan gpu, cpu;
  std::unique_ptr<Any> ours, theirs;
  std::vector<GroupRow> groups;
  explicit Pair(const char* rule, int64_t n = 9000, bool count_on_device = true)
      : ours(make(rule_number(rule), n, F, F, {F}, 0, 3)),
        theirs(make(rule_number(rule), n, F, F, {F}, 0, 3)),
        groups{group_of(rule_number(rule))} {
    ours->tensor.step_on_device = count_on_device;
    gpu.add(ours->tensor);
    cpu.add(theirs->tensor);
  }
  void step_on_cpu(int times) {
    for (int k = 0; k < times; ++k) run_on_cpu(&cpu, groups, Control{}, 1);
  }
  bool same() const { return same_memory(*ours, *theirs) && ours->step == theirs->step; }
};

// What the runtime itself promises.

void kernel(float* out) { *out = 1.0f; }

void events_wait_and_errors_stay() {
  const cudaStream_t stream = new_stream();
  cudaEvent_t event;
  CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming) == cudaSuccess);
  CHECK(cudaEventQuery(event) == cudaSuccess);  // never recorded
  CHECK(cudaEventRecord(event, stream) == cudaSuccess);
  CHECK(cudaEventQuery(event) == cudaErrorNotReady);
  CHECK(cudaGetLastError() == cudaErrorNotReady && cudaGetLastError() == cudaSuccess);
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(cudaEventQuery(event) == cudaSuccess);
  cudaEventDestroy(event);
}

void a_copy_reads_its_source_late() {
  void *device, *pinned;
  CHECK(cudaMalloc(&device, 4) == cudaSuccess && cudaHostAlloc(&pinned, 4, cudaHostAllocDefault) == cudaSuccess);
  std::memset(pinned, 1, 4);
  CHECK(cudaMemcpyAsync(device, pinned, 4, cudaMemcpyHostToDevice, nullptr) == cudaSuccess);
  std::memset(pinned, 2, 4);
  CHECK(cudaStreamSynchronize(nullptr) == cudaSuccess);
  CHECK(static_cast<char*>(device)[0] == 2);
  CHECK(cudaFree(device) == cudaSuccess && cudaFreeHost(pinned) == cudaSuccess);
}

void a_capture_forbids_what_the_global_mode_does() {
  const cudaStream_t stream = new_stream();
  void* data = nullptr;
  cudaEvent_t event;
  cudaEventCreateWithFlags(&event, 0);
  const std::vector<std::function<cudaError_t()>> calls = {
      [&] { return cudaMalloc(&data, 4); }, [&] { return cudaHostAlloc(&data, 4, 0); },
      [&] { return cudaEventQuery(event); }, [&] { return cudaStreamSynchronize(nullptr); }};
  for (const auto& call : calls) {
    cudaGraph_t graph;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
    CHECK(call() == cudaErrorStreamCaptureUnsupported);
    CHECK(cudaStreamEndCapture(stream, &graph) == cudaErrorStreamCaptureInvalidated);
  }
  cudaGetLastError();
  cudaEventDestroy(event);
}

void memory_is_of_one_device_and_poisoned_where_a_graph_is_left() {
  void *on_0, *on_1;
  CHECK(cudaMalloc(&on_0, 4) == cudaSuccess);
  CHECK(cudaSetDevice(1) == cudaSuccess && cudaMalloc(&on_1, 4) == cudaSuccess && cudaSetDevice(0) == cudaSuccess);
  const auto launch_on = [](void* data, cudaStream_t stream) {
    return cuda_on_host::launch_kernel(&kernel, 1, 1, stream, static_cast<float*>(data));
  };
  CHECK(launch_on(on_0, nullptr) == cudaSuccess && launch_on(on_1, nullptr) == cudaErrorIllegalAddress);
  const cudaStream_t stream = new_stream();
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK(launch_on(on_0, stream) == cudaSuccess && cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  CHECK(cuda_on_host::replay(graph) == cudaSuccess);
  CHECK(cudaFree(on_0) == cudaSuccess);
  CHECK(cuda_on_host::replay(graph) == cudaErrorIllegalAddress);
  cuda_on_host::destroy(graph);
  CHECK(cudaFree(on_1) == cudaSuccess);
  cudaGetLastError();
}

// What the backend makes of it.

void a_busy_stream_is_no_error() {
  Pair pair("adamw");
  CudaExecutor cuda(0);
  const cudaStream_t stream = new_stream();
  for (int step = 0; step < 4; ++step) {
    cuda.run(&pair.gpu, pair.groups, on(stream));
    CHECK(cudaGetLastError() == cudaSuccess);
  }
  // Somebody else's error is not the launch's.
  cuda_on_host::last_error = cudaErrorNotReady;
  cuda.run(&pair.gpu, pair.groups, on(stream));
  CHECK(cudaGetLastError() == cudaErrorNotReady);
  pair.step_on_cpu(5);
  CHECK(pair.same());
}

void pinned_memory_is_used_again_once_its_copy_has_run() {
  Pair pair("adamw", 9000, false);  // scalars from the host: a table that changes with every step
  CudaExecutor cuda(0);
  const cudaStream_t stream = new_stream();
  int before = 0;
  for (int step = 0; step < 6; ++step) {
    cuda.run(&pair.gpu, pair.groups, on(stream));
    CHECK(step < 2 || runtime().allocations == before);
    before = runtime().allocations;
    CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  }
  cuda.run(&pair.gpu, pair.groups, on(stream));
  cuda.run(&pair.gpu, pair.groups, on(stream));
  CHECK(runtime().allocations > before);  // the copy has not run: another block
  pair.step_on_cpu(8);
  CHECK(pair.same());
}

cudaGraph_t capture(cudaStream_t stream, const std::function<void()>& step) {
  cudaGraph_t graph;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  step();
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  return graph;
}

// Also where the first step is the captured one, and every table is new.
void a_captured_step_can_be_replayed(bool warm, bool clip) {
  Pair pair("adamw");
  CudaExecutor cuda(0);
  const cudaStream_t stream = new_stream();
  float lr = 0.5f, norm = 0.0f, coef = 0.0f;
  double total = 0.0;
  const auto step = [&] {
    DeviceStep of = on(stream);
    of.overrides = {{&lr, 0, hyper_index(rule_number("adamw"), "lr"), 0}};
    if (clip) of.clip = {&total, &norm, &coef, nullptr, 1e9f, 1, 0, 0, 1};
    cuda.run(&pair.gpu, pair.groups, of);
  };
  const auto on_cpu = [&] {
    pair.groups[0].hyper[hyper_index(rule_number("adamw"), "lr")] = double(lr);
    pair.step_on_cpu(1);
  };
  if (warm) step(), on_cpu();
  const cudaGraph_t graph = capture(stream, step);
  for (const float rate : {0.5f, 0.25f, 0.125f}) {
    lr = rate;
    CHECK(cuda_on_host::replay(graph) == cudaSuccess);
    on_cpu();
  }
  CHECK(pair.same() && (!clip || (norm > 0.0f && coef == 1.0f)));
  step();  // and a step that is not captured goes on from there
  on_cpu();
  CHECK(cuda_on_host::replay(graph) == cudaSuccess);
  on_cpu();
  CHECK(pair.same());
  cuda_on_host::destroy(graph);
}

void a_refused_step_leaves_no_trace() {
  Pair pair("adamw", 5000, false);  // counts on the host, so it must not be captured
  CudaExecutor cuda(0);
  const cudaStream_t stream = new_stream();
  cuda.run(&pair.gpu, pair.groups, on(stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  CHECK(fails([&] { cuda.run(&pair.gpu, pair.groups, on(stream)); }));
  // Nor may the legacy stream be used beside a capture: an error of CUDA's, which is said once.
  CHECK(fails([&] { cuda.run(&pair.gpu, pair.groups, on(nullptr)); }));
  CHECK(cudaGetLastError() == cudaSuccess);
  cudaGraph_t graph;
  CHECK(cudaStreamEndCapture(stream, &graph) == cudaSuccess);
  cuda_on_host::destroy(graph);
  CHECK(!cuda.was_captured());
  cuda.run(&pair.gpu, pair.groups, on(stream));
  pair.step_on_cpu(2);
  CHECK(pair.same());
}

void a_graph_outlives_tables_that_grow() {
  Pair pair("sgd_momentum", 700);
  auto late = make(rule_number("sgd_momentum"), 90000, F, F, {F}, 0, 2);
  const Operand gradient = late->tensor.g;
  late->tensor.g = {};
  late->tensor.active = false;
  pair.gpu.add(late->tensor);
  CudaExecutor cuda(0);
  const cudaStream_t stream = new_stream();
  const auto step = [&] { cuda.run(&pair.gpu, pair.groups, on(stream)); };
  step();
  const cudaGraph_t graph = capture(stream, step);
  pair.gpu.tensor(1).g = gradient;
  pair.gpu.tensor(1).active = true;
  step();  // with more chunks
  step();  // frees what was put aside
  CHECK(cuda_on_host::replay(graph) == cudaSuccess);
  pair.step_on_cpu(4);
  CHECK(pair.same() && late->step == 2.0f);
  cuda_on_host::destroy(graph);
}

void a_step_beside_a_capture_of_another_thread_leaves_it_alone() {
  Pair captured("adamw"), other("adamw", 5000);
  CudaExecutor cuda(0);
  const cudaStream_t stream = new_stream(), beside = new_stream();
  const cudaGraph_t graph = capture(stream, [&] {
    cuda.run(&captured.gpu, captured.groups, on(stream));
    std::thread([&] {
      CudaExecutor first(0);
      for (int k = 0; k < 3; ++k) first.run(&other.gpu, other.groups, on(beside));
    }).join();
  });
  CHECK(cuda_on_host::replay(graph) == cudaSuccess);
  captured.step_on_cpu(1);
  other.step_on_cpu(3);
  CHECK(captured.same() && other.same());
  cuda_on_host::destroy(graph);
}

// As Python's garbage collector may do at any time.
void a_plan_that_dies_during_a_capture_leaves_it_alone() {
  Pair captured("adamw"), dead("adamw");
  const cudaStream_t stream = new_stream();
  CudaExecutor cuda(0);
  auto dying = std::make_unique<CudaExecutor>(0);
  dying->run(&dead.gpu, dead.groups, on(stream));
  cuda.run(&captured.gpu, captured.groups, on(stream));
  const cudaGraph_t graph = capture(stream, [&] {
    cuda.run(&captured.gpu, captured.groups, on(stream));
    dying.reset();
  });
  CHECK(cuda_on_host::replay(graph) == cudaSuccess);
  captured.step_on_cpu(2);
  CHECK(captured.same());
  cuda_on_host::destroy(graph);
  const size_t before = runtime().memory.size();
  cuda.run(&captured.gpu, captured.groups, on(stream));
  CHECK(runtime().memory.size() < before);  // freed now
}

void a_plan_sets_no_device() {
  std::thread([] {  // whose current device is 0
    Pair pair("adamw"), wrong("adamw");
    CHECK(cudaSetDevice(1) == cudaSuccess);
    const int sets = runtime().sets;
    {
      CudaExecutor cuda(1);
      const cudaStream_t stream = new_stream();
      for (int k = 0; k < 2; ++k) cuda.run(&pair.gpu, pair.groups, on(stream));
      CHECK(why_not_on(1).empty());
    }
    CHECK(runtime().sets == sets && cuda_on_host::current_device == 1);
    pair.step_on_cpu(2);
    CHECK(pair.same());
    CudaExecutor elsewhere(0);
    CHECK(fails([&] { elsewhere.run(&wrong.gpu, wrong.groups, on(nullptr)); }));
    CHECK(runtime().sets == sets);
  })
      .join();
}

void a_device_without_code_says_so() {
  runtime().attributes[0] = cudaErrorNoKernelImageForDevice;
  CHECK(!why_not_on(0).empty() && cudaGetLastError() == cudaSuccess);
  runtime().attributes[0] = cudaErrorMemoryAllocation;  // which says nothing of code
  CHECK(fails([] { why_not_on(0); }) && cudaGetLastError() == cudaSuccess);
  runtime().attributes[0] = cudaSuccess;
  CHECK(why_not_on(0).empty());
}

}  // namespace

int main() {
#define RUN(...) (__VA_ARGS__, std::printf("passed %s\n", #__VA_ARGS__))
  RUN(events_wait_and_errors_stay());
  RUN(a_copy_reads_its_source_late());
  RUN(a_capture_forbids_what_the_global_mode_does());
  RUN(memory_is_of_one_device_and_poisoned_where_a_graph_is_left());
  RUN(a_busy_stream_is_no_error());
  RUN(pinned_memory_is_used_again_once_its_copy_has_run());
  for (const bool warm : {true, false})
    for (const bool clip : {true, false}) RUN(a_captured_step_can_be_replayed(warm, clip));
  RUN(a_refused_step_leaves_no_trace());
  RUN(a_graph_outlives_tables_that_grow());
  RUN(a_step_beside_a_capture_of_another_thread_leaves_it_alone());
  RUN(a_plan_that_dies_during_a_capture_leaves_it_alone());
  RUN(a_plan_sets_no_device());
  RUN(a_device_without_code_says_so());
  std::puts("all passed");
}
