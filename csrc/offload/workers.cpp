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

// Which of them are taken.
struct Processors {
  const std::vector<int> numbers = processors();
  std::mutex mutex;
  std::vector<bool> taken = std::vector<bool>(numbers.size());

  static Processors& of_process() {
    static Processors& all = *new Processors;
    return all;
  }
  // Not where processes share them: each would take the first ones.
  bool are_shared() const {
    const char* const ranks = std::getenv("LOCAL_WORLD_SIZE");
    return ranks != nullptr && std::atoi(ranks) > 1 && numbers.size() >= std::thread::hardware_concurrency();
  }
  int take() {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = std::find(taken.begin(), taken.end(), false);
    if (found == taken.end() || are_shared()) return -1;
    *found = true;
    return int(found - taken.begin());
  }
  void give(int place) {
    const std::lock_guard<std::mutex> lock(mutex);
    taken[size_t(place)] = false;
  }
};

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
    wanted_ = std::max(threads, 1);
    while (int(threads_.size()) < wanted_) threads_.emplace_back(&Workers::work, this, int(threads_.size()));
    pieces_.push_back(std::move(piece));
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

void Workers::work(int index) {
  const OnOwnProcessor own;
  const IeeeDenormals ieee;
  while (const std::shared_ptr<Piece> piece = first(index)) {
    take_from(*piece);
    drop(piece);
  }
  changed_.notify_all();
}

#if defined(__linux__)

OnOwnProcessor::OnOwnProcessor() {
  Processors& all = Processors::of_process();
  place_ = all.take();
  cpu_set_t mask;
  CPU_ZERO(&mask);
  for (size_t i = 0; i < all.numbers.size(); ++i)
    if (place_ < 0 || i == size_t(place_)) CPU_SET(all.numbers[i], &mask);
  sched_setaffinity(0, sizeof mask, &mask);
}

OnOwnProcessor::~OnOwnProcessor() {
  if (place_ >= 0) Processors::of_process().give(place_);
}

#else

OnOwnProcessor::OnOwnProcessor() {}
OnOwnProcessor::~OnOwnProcessor() {}

#endif

}  // namespace precond
