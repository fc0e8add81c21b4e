// See workers.h.
#include "offload/workers.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "base/denormals.h"

namespace precond {
namespace {

// A wait begins with looking again at once, since pieces follow each other; a backward pass may then take long.
constexpr int kLooks = 4096;
constexpr std::chrono::microseconds kNap{50};

void pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

#if defined(__linux__)
// Those that the process may use. With OMP_PROC_BIND the thread that made this one is bound to one of them.
std::vector<int> processors() {
  std::vector<int> all;
#if defined(_OPENMP)
  for (int place = 0; place < omp_get_num_places(); ++place) {
    std::vector<int> some(size_t(omp_get_place_num_procs(place)));
    omp_get_place_proc_ids(place, some.data());
    all.insert(all.end(), some.begin(), some.end());
  }
#endif
  cpu_set_t mask;
  if (all.empty() && sched_getaffinity(0, sizeof mask, &mask) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &mask)) all.push_back(cpu);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

int number_in(const char* name, int otherwise) {
  const char* const value = std::getenv(name);
  return value == nullptr ? otherwise : std::atoi(value);
}
#endif

}  // namespace

Workers::~Workers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::add(std::shared_ptr<Piece> piece, int threads) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    pieces_.push_back(std::move(piece));
    wanted_ = std::max(threads, 1);
    while (int(threads_.size()) < wanted_) threads_.emplace_back(&Workers::work, this, int(threads_.size()), wanted_);
  }
  changed_.notify_all();
}

std::shared_ptr<Piece> Workers::first(int index) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return (!pieces_.empty() && index < wanted_) || (stop_ && pieces_.empty()); });
  return pieces_.empty() ? nullptr : pieces_.front();
}

void Workers::drop(const std::shared_ptr<Piece>& piece) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!pieces_.empty() && pieces_.front() == piece) pieces_.pop_front();
}

void Workers::take_from(Piece& piece) {
  const auto failed = [&] {
    const std::lock_guard<std::mutex> lock(piece.mutex_);
    if (piece.error_ == nullptr) piece.error_ = std::current_exception();
  };
  bool there = true;
  try {
    for (int looks = 0; !piece.is_there(); ++looks) {
      if (looks < kLooks)
        pause();
      else
        std::this_thread::sleep_for(kNap);
    }
  } catch (...) {
    failed();
    there = false;
  }
  for (int64_t part; (part = piece.next_.fetch_add(1)) < piece.parts_;) {
    try {
      if (there) piece.run(part);
    } catch (...) {
      failed();
    }
    if (piece.left_.fetch_sub(1) == 1) piece.finish(piece.error_);
  }
}

void Workers::work(int index, int threads) {
  stay_on_processor(index, threads);
  const IeeeDenormals ieee;
  while (const std::shared_ptr<Piece> piece = first(index)) {
    take_from(*piece);
    drop(piece);
  }
  changed_.notify_all();
}

bool stay_on_processor(int i, int threads) {
#if defined(__linux__)
  const std::vector<int> all = processors();
  const int ranks = std::max(number_in("LOCAL_WORLD_SIZE", 1), 1), rank = number_in("LOCAL_RANK", 0);
  // A launcher that binds its processes has given each fewer than the machine has.
  const bool shared = ranks > 1 && int(all.size()) >= int(std::thread::hardware_concurrency());
  const int each = shared ? int(all.size()) / ranks : int(all.size());
  const int begin = shared ? rank * each : 0;
  const bool alone = threads <= each && i < each && rank >= 0 && begin + i < int(all.size());
  cpu_set_t own;
  CPU_ZERO(&own);
  for (const int cpu : alone ? std::vector<int>{all[size_t(begin + i)]} : all) CPU_SET(cpu, &own);
  return sched_setaffinity(0, sizeof own, &own) == 0 && alone;
#else
  static_cast<void>(i);
  static_cast<void>(threads);
  return false;
#endif
}

}  // namespace precond
