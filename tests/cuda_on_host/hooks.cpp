// The emulated runtime from Python: tests/support/device.py calls these by ctypes.
#include <cuda_runtime.h>

#define HOOK extern "C" __attribute__((visibility("default")))
using namespace cuda_on_host;

HOOK void* hook_new_stream() {
  cudaStream_t stream;
  return cudaStreamCreate(&stream), stream;
}
HOOK int hook_enqueued(void* stream) { return int(static_cast<Stream*>(stream)->enqueued); }
HOOK int hook_synchronize(void* stream) { return cudaStreamSynchronize(static_cast<Stream*>(stream)); }
HOOK int hook_begin_capture(void* stream) { return begin_capture(static_cast<Stream*>(stream)); }
HOOK int hook_end_capture(void* stream, void** graph) {
  return end_capture(static_cast<Stream*>(stream), reinterpret_cast<Graph**>(graph));
}
HOOK int hook_replay(void* graph) { return replay(static_cast<Graph*>(graph)); }
HOOK void hook_destroy_graph(void* graph) { destroy(static_cast<Graph*>(graph)); }
HOOK int hook_take_last_error() { return cudaGetLastError(); }
HOOK int hook_set_device(int device) { return cudaSetDevice(device); }
HOOK int hook_device_sets() { return runtime().sets; }
HOOK void hook_set_no_code(int device, int value) {
  runtime().attributes[device] = value != 0 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}
// Streams that work by themselves stand still, or go on.
HOOK void hook_hold(int held) {
  const Lock lock(runtime().mutex);
  each_stream([&](Stream* stream) {
    if (stream->engine != nullptr) stream->engine->hold(held != 0);
  });
}
HOOK void hook_fail(int error) {
  const Lock lock(runtime().mutex);
  each_stream([&](Stream* stream) {
    if (stream->engine != nullptr) stream->engine->error = error;
  });
}
HOOK void hook_trace(int on) {
  const Lock lock(runtime().mutex);
  runtime().traces = on != 0;
  if (on != 0) runtime().trace.clear();
}
// The i-th of what was traced: kind, whether the stream works by itself, and the value. Returns how many there are.
HOOK int hook_traced(int i, int64_t* item) {
  const Lock lock(runtime().mutex);
  const std::vector<Traced>& all = runtime().trace;
  if (size_t(i) < all.size()) {
    const auto* const stream = static_cast<const Stream*>(all[size_t(i)].stream);
    item[0] = int64_t(all[size_t(i)].kind);
    item[1] = stream->engine != nullptr;
    item[2] = int64_t(all[size_t(i)].value);
  }
  return int(all.size());
}
