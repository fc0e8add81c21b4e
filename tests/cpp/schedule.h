// What overlaps, from what the emulated runtime was given: no clock is read.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <functional>
#include <map>
#include <vector>

#include "problem.h"

namespace {

using cuda_on_host::Kind;
using cuda_on_host::Traced;

// How long it would take on a machine whose copies and updates all take a unit a byte of gradients, and their sum:
// what waits for what, by what was enqueued.
struct Times {
  double together = 0.0, one_by_one = 0.0;
};
Times simulate(const std::vector<Traced>& trace, uint32_t before) {
  std::map<const void*, std::vector<Traced>> streams;
  Times times;
  for (const Traced& item : trace) {
    streams[item.stream].push_back(item);
    if (item.kind == Kind::kDownload) times.one_by_one += 2.0 * double(item.value);
    if (item.kind == Kind::kUpload) times.one_by_one += double(item.value);
  }
  std::map<const void*, double> clock, event;
  std::map<uint32_t, double> arrived, updated, size;
  std::map<const void*, size_t> next;
  double host = 0.0;
  uint32_t done = before;
  std::map<const void*, double> bytes;  // that a stream has read since it wrote a number
  for (bool moved = true; moved;) {
    moved = false;
    for (auto& [stream, items] : streams) {
      while (next[stream] < items.size()) {
        const Traced& item = items[next[stream]];
        double& now = clock[stream];
        if (item.kind == Kind::kDownload || item.kind == Kind::kUpload) {
          now += double(item.value);
          if (item.kind == Kind::kDownload) bytes[stream] += double(item.value);
        } else if (item.kind == Kind::kRecord) {
          event[item.object] = now;
        } else if (item.kind == Kind::kWaitForEvent) {
          if (event.count(item.object) == 0) break;
          now = std::max(now, event[item.object]);
        } else if (item.kind == Kind::kWriteNumber) {
          arrived[uint32_t(item.value)] = now;
          size[uint32_t(item.value)] = bytes[stream];
          bytes[stream] = 0.0;
        } else if (item.kind == Kind::kWaitForNumber) {
          const auto value = uint32_t(item.value);
          if (int32_t(value - before) > 0) {
            if (updated.count(value) == 0) break;
            now = std::max(now, updated[value]);
          }
        }
        ++next[stream];
        moved = true;
      }
    }
    while (arrived.count(done + 1) != 0) {  // the host's threads take pieces in order
      ++done;
      host = updated[done] = std::max(host, arrived[done]) + size[done];
      moved = true;
    }
  }
  for (const auto& [stream, items] : streams) CHECK(next[stream] == items.size());  // nothing waits for ever
  for (const auto& [stream, at] : clock) times.together = std::max(times.together, at);
  return times;
}

std::vector<Traced> traced(const std::function<void()>& work) {
  using cuda_on_host::runtime;
  {
    const cuda_on_host::Lock lock(runtime().mutex);
    runtime().trace.clear();
    runtime().traces = true;
  }
  work();
  const cuda_on_host::Lock lock(runtime().mutex);
  runtime().traces = false;
  return runtime().trace;
}

}  // namespace
