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
