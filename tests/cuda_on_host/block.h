// Runs the threads of a block on one thread of the host. Where they meet, at a shuffle or a barrier, each is a fiber
// that waits there for the others; a block whose first thread meets nobody is a plain loop. Included by cuda_runtime.h.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx, blockDim;

namespace cuda_on_host {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

// What a fiber waits for.
enum class Meeting { shuffle, barrier, done };

// A stack that can be left and entered again; tells the sanitizers, which follow stacks.
struct Context {
  ucontext_t context;
  const void* stack = nullptr;
  size_t bytes = 0;
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif

  void switch_to(Context& other) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, other.stack, other.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(other.tsan, 0);
#endif
    swapcontext(&context, &other.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &other.stack, &other.bytes);  // back from the other one
#endif
  }
};

struct Fiber : Context {
  std::unique_ptr<char[]> memory;  // none: never needed so far
  Meeting waits = Meeting::done;
  // What it gave at a shuffle, by turns: a lane that goes first may already be at the next one.
  uint64_t given[2] = {};
  int turn = 0;
};

// What a thread of the host runs one block after the other with: fibers that are done with one wait for the next.
class Block {
 public:
  // The one that this thread of the host runs.
  static Block*& own() {
    static thread_local Block* block = nullptr;
    return block;
  }
#if defined(__SANITIZE_THREAD__)
  ~Block() {
    for (Fiber& fiber : fibers_)
      if (fiber.tsan != nullptr) __tsan_destroy_fiber(fiber.tsan);
  }
#endif

  void run(int threads, const std::function<void()>& kernel) {
    own() = this;
    kernel_ = &kernel;
#if defined(__SANITIZE_THREAD__)
    scheduler_.tsan = __tsan_get_current_fiber();
#endif
    if (int(fibers_.size()) < threads) fibers_.resize(size_t(threads));
    resume(0);
    if (fibers_[0].waits != Meeting::done) {
      Meeting met = run_warps(threads, 1);
      while (met == Meeting::barrier) met = run_warps(threads, 0);
      return;
    }
    for (int i = 1; i < threads; ++i) {
      threadIdx.x = unsigned(i);
      kernel();
    }
  }

  // The rest is called by a thread of the block.
  void meet(Meeting meeting) {
    if (current_ < 0) fail("threads must meet where the first thread of their block does");
    Fiber& fiber = fibers_[size_t(current_)];
    fiber.waits = meeting;
    fiber.switch_to(scheduler_);
  }
  uint64_t shuffle(uint64_t value, int lane_mask) {
    const int me = int(threadIdx.x);
    Fiber& fiber = fibers_[size_t(me)];
    fiber.turn ^= 1;
    fiber.given[fiber.turn] = value;
    meet(Meeting::shuffle);
    return fibers_[size_t(me ^ lane_mask)].given[fiber.turn];
  }

 private:
  static void enter() {
    Block& block = *own();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_.stack, &block.scheduler_.bytes);
#endif
    for (;;) {
      (*block.kernel_)();
      block.meet(Meeting::done);
    }
  }

  void make(Fiber& fiber) {
    fiber.memory.reset(new char[kStackBytes]);
    fiber.stack = fiber.memory.get();
    fiber.bytes = kStackBytes;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.memory.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
  }

  void resume(int i) {
    Fiber& fiber = fibers_[size_t(i)];
    if (fiber.memory == nullptr) make(fiber);
    current_ = i;
    threadIdx.x = unsigned(i);
    scheduler_.switch_to(fiber);
    current_ = -1;
  }

  // Every thread, from `from` on, to the next barrier or its end.
  Meeting run_warps(int threads, int from) {
    Meeting all = Meeting::done;
    for (int first = 0; first < threads; first += kWarp) {
      const int end = first + kWarp < threads ? first + kWarp : threads;
      Meeting met = advance(first, end, first < from ? from : first);
      while (met == Meeting::shuffle) met = advance(first, end, first);
      if (first > 0 && met != all) fail("the warps of a block must meet at the same barrier");
      all = met;
    }
    return all;
  }
  // The lanes of a warp to their next meeting.
  Meeting advance(int first, int end, int from) {
    for (int i = from; i < end; ++i) resume(i);
    for (int i = first; i < end; ++i)
      if (fibers_[size_t(i)].waits != fibers_[size_t(first)].waits) fail("the lanes of a warp must meet together");
    return fibers_[size_t(first)].waits;
  }

  const std::function<void()>* kernel_ = nullptr;
  Context scheduler_;
  std::vector<Fiber> fibers_;
  int current_ = -1;  // the fiber that runs
};

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Block::own()->meet(cuda_on_host::Meeting::barrier); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle takes up to 8 bytes");
  if (mask != 0xffffffffu) cuda_on_host::fail("a shuffle must name every lane");
  uint64_t bytes = 0;
  std::memcpy(&bytes, &value, sizeof value);
  bytes = cuda_on_host::Block::own()->shuffle(bytes, lane_mask);
  std::memcpy(&value, &bytes, sizeof value);
  return value;
}
