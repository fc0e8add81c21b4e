// The state of the emulated CUDA runtime, and its rules. Included by cuda_runtime.h.
//
// It says no wherever a GPU would:
//   - an event is not ready until its stream has been waited for, and asking leaves cudaErrorNotReady as the last
//   error;
//   - a copy runs when its stream launches a kernel or is waited for, so a source that is overwritten before shows;
//   - while a graph is captured, a call that the global mode forbids fails and invalidates the capture;
//   - a graph records launches and copies, and a replay runs them; memory that was freed since is poisoned and may not
//   be
//     used, nor may memory of another device;
//   - a stream made with flags works by itself, on a thread: it copies between the device and pinned memory alone, and
//   waits for events and for numbers in pinned memory; whoever waits for its events waits for that;
//   - there are kDevices devices, and sets of one that was not current are counted.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2,
                      cudaErrorInvalidConfiguration = 9, cudaErrorInvalidDeviceFunction = 98,
                      cudaErrorInvalidDevice = 101, cudaErrorNoKernelImageForDevice = 209,
                      cudaErrorInvalidResourceHandle = 400, cudaErrorNotReady = 600, cudaErrorIllegalAddress = 700,
                      cudaErrorStreamCaptureUnsupported = 900, cudaErrorStreamCaptureInvalidated = 901,
                      cudaErrorStreamCaptureImplicit = 906, cudaErrorCapturedEvent = 907;

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};

namespace cuda_on_host {

constexpr int kDevices = 2;
constexpr int kHost = -1;  // the device of pinned memory

// A launch or a copy: what it reads and writes by the addresses that it is given, and what it does.
struct Work {
  std::vector<const void*> addresses;
  bool pinned_too;  // may use pinned memory: a copy
  std::function<void()> run;
};

struct Graph {
  int device;
  std::vector<Work> nodes;
};

// What a stream was given, for tests that follow what waits for what.
enum class Kind { kDownload, kUpload, kOtherCopy, kRecord, kWaitForEvent, kWaitForNumber, kWriteNumber, kKernel };
struct Traced {
  Kind kind;
  const void* stream;
  const void* object;  // the event or the number, or the device's side of a copy
  size_t value;        // of a number, or bytes
};

// A thread that does what a stream is given, in order.
class Engine {
 public:
  Engine() : thread_(&Engine::work, this) {}
  ~Engine() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  void add(std::function<void()> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    work_.push_back(std::move(work));
    ++given_;
    changed_.notify_all();
  }
  uint64_t given() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return given_;
  }
  bool has_done(uint64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return done_ >= count;
  }
  void wait_for(uint64_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return done_ >= count; });
  }
  // While held, it does nothing: a device that is busy.
  void hold(bool held) {
    const std::lock_guard<std::mutex> lock(mutex_);
    held_ = held;
    changed_.notify_all();
  }
  // Its stream fails from now on, as after an illegal access.
  std::atomic<int> error{0};

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [&] { return stop_ || (!work_.empty() && !held_); });
      if (work_.empty()) return;
      const std::function<void()> next = std::move(work_.front());
      work_.pop_front();
      lock.unlock();
      if (error == 0) next();
      lock.lock();
      ++done_;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> work_;
  uint64_t given_ = 0, done_ = 0;
  bool held_ = false, stop_ = false;
  std::thread thread_;  // last: it uses the others
};

struct Stream {
  int device;
  std::vector<Work> copies;  // not run yet
  uint64_t enqueued = 0, waited_for = 0;
  std::unique_ptr<Graph> captured;  // while a capture is on
  bool invalidated = false;
  std::unique_ptr<Engine> engine;  // of a stream that works by itself
};

struct Event {
  Stream* stream = nullptr;  // null: not recorded
  uint64_t at = 0;           // among what the stream was given
  bool captured = false;
};

struct Allocation {
  size_t bytes;
  int device;
  bool freed;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::map<char*, Allocation> memory;
  std::set<Graph*> graphs;  // that can still be replayed
  std::set<Stream*> streams;
  Stream default_stream[kDevices] = {{0, {}, 0, 0, nullptr, false, nullptr}, {1, {}, 0, 0, nullptr, false, nullptr}};
  cudaError_t attributes[kDevices] = {};  // what cudaFuncGetAttributes answers there
  int sets = 0;                           // of a device that was not current
  int allocations = 0;                    // ever made
  bool traces = false;
  std::vector<Traced> trace;
};
inline Runtime& runtime() {
  static Runtime& all = *new Runtime;  // never destroyed, as a driver
  return all;
}
using Lock = std::lock_guard<std::recursive_mutex>;

inline thread_local cudaError_t last_error = cudaSuccess;
inline thread_local int current_device = 0;
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

inline cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline Stream* stream_of(Stream* handle) {
  return handle != nullptr ? handle : &runtime().default_stream[current_device];
}

template <class Visit>
void each_stream(const Visit& visit) {
  for (Stream& stream : runtime().default_stream) visit(&stream);
  for (Stream* stream : runtime().streams) visit(stream);
}

// True, and the capture is over, where this thread may not make an unsafe call.
inline bool is_forbidden() {
  bool found = false;
  if (capture_mode != cudaStreamCaptureModeRelaxed)
    each_stream([&](Stream* stream) {
      if (stream->captured != nullptr) found = stream->invalidated = true;
    });
  return found;
}

inline cudaError_t check(const Work& work, int device) {
  for (const void* address : work.addresses) {
    if (address == nullptr) continue;
    char* const at = static_cast<char*>(const_cast<void*>(address));
    auto found = runtime().memory.upper_bound(at);
    if (found == runtime().memory.begin()) continue;  // torch's
    --found;
    const Allocation& allocation = found->second;
    if (at >= found->first + allocation.bytes) continue;
    if (allocation.freed) return cudaErrorIllegalAddress;
    if (allocation.device != device && !(work.pinned_too && allocation.device == kHost)) return cudaErrorIllegalAddress;
  }
  return cudaSuccess;
}

inline cudaError_t run_copies(Stream* stream) {
  for (const Work& copy : stream->copies) {
    if (const cudaError_t error = check(copy, stream->device)) return error;
    copy.run();
  }
  stream->copies.clear();
  return cudaSuccess;
}

// By whoever enqueues, under the lock.
inline void trace(Kind kind, const Stream* stream, const void* object, size_t value) {
  if (runtime().traces) runtime().trace.push_back({kind, stream, object, value});
}

inline bool is_pinned(const void* address) {
  const auto found = runtime().memory.upper_bound(static_cast<char*>(const_cast<void*>(address)));
  if (found == runtime().memory.begin()) return false;
  const auto& [start, allocation] = *std::prev(found);
  return !allocation.freed && allocation.device == kHost && address < start + allocation.bytes;
}

inline cudaError_t wait_for(Stream* stream) {
  stream->waited_for = stream->enqueued;
  return run_copies(stream);
}
inline void wait_for_everything() {
  each_stream([](Stream* stream) {
    if (stream->engine == nullptr) wait_for(stream);
  });
}

inline cudaError_t enqueue(Stream* handle, Work work, bool now) {
  const Lock lock(runtime().mutex);
  Stream* const stream = stream_of(handle);
  if (stream->device != current_device) return cudaErrorInvalidResourceHandle;
  if (stream->engine != nullptr) {
    if (now) return cudaErrorInvalidValue;  // of kernels nothing here is its own
    if (const cudaError_t error = check(work, stream->device)) return error;
    stream->engine->add(std::move(work.run));
    return stream->engine->error.load();
  }
  ++stream->enqueued;
  if (now) trace(Kind::kKernel, stream, nullptr, 0);
  if (stream->captured != nullptr) {
    stream->captured->nodes.push_back(std::move(work));
    return cudaSuccess;
  }
  if (!now) {
    stream->copies.push_back(std::move(work));
    return cudaSuccess;
  }
  if (const cudaError_t error = run_copies(stream)) return error;
  if (const cudaError_t error = check(work, stream->device)) return error;
  work.run();
  return cudaSuccess;
}

inline cudaError_t allocate(void** data, size_t bytes, int device) {
  const Lock lock(runtime().mutex);
  if (is_forbidden()) return cudaErrorStreamCaptureUnsupported;
  *data = std::malloc(bytes + (bytes == 0));
  if (*data == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*data, 0xff, bytes);  // NaN until something is written
  runtime().memory[static_cast<char*>(*data)] = {bytes, device, false};
  ++runtime().allocations;
  return cudaSuccess;
}

inline cudaError_t release(void* data, bool pinned) {
  const Lock lock(runtime().mutex);
  if (data == nullptr) return cudaSuccess;
  if (is_forbidden()) return cudaErrorStreamCaptureUnsupported;
  const auto found = runtime().memory.find(static_cast<char*>(data));
  if (found == runtime().memory.end() || found->second.freed || (found->second.device == kHost) != pinned)
    return cudaErrorInvalidValue;
  wait_for_everything();
  if (runtime().graphs.empty()) {
    std::free(data);
    runtime().memory.erase(found);
  } else {
    std::memset(data, 0xdb, found->second.bytes);
    found->second.freed = true;
  }
  return cudaSuccess;
}

inline cudaError_t begin_capture(Stream* stream) {
  const Lock lock(runtime().mutex);
  if (stream == nullptr) return cudaErrorStreamCaptureUnsupported;  // the legacy stream cannot be captured
  stream->captured = std::make_unique<Graph>(Graph{stream->device, {}});
  stream->invalidated = false;
  return cudaSuccess;
}
inline cudaError_t end_capture(Stream* stream, Graph** graph) {
  const Lock lock(runtime().mutex);
  *graph = nullptr;
  const std::unique_ptr<Graph> captured = std::move(stream->captured);
  if (captured == nullptr) return cudaErrorInvalidValue;
  if (stream->invalidated) return cudaErrorStreamCaptureInvalidated;
  *graph = new Graph(*captured);
  runtime().graphs.insert(*graph);
  return cudaSuccess;
}
inline cudaError_t replay(Graph* graph) {
  const Lock lock(runtime().mutex);
  for (const Work& node : graph->nodes) {
    if (const cudaError_t error = check(node, graph->device)) return error;
    node.run();
  }
  return cudaSuccess;
}
inline void destroy(Graph* graph) {
  const Lock lock(runtime().mutex);
  runtime().graphs.erase(graph);
  delete graph;
  if (!runtime().graphs.empty()) return;
  for (auto item = runtime().memory.begin(); item != runtime().memory.end();) {
    if (item->second.freed) std::free(item->first);
    item = item->second.freed ? runtime().memory.erase(item) : std::next(item);
  }
}

}  // namespace cuda_on_host
