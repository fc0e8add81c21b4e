// Threads that work through pieces in their order, beside the thread that hands them in.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace precond {

// Parts that may run at the same time, once what they work on is there. All threads share a piece before one takes the
// next.
class Piece {
 public:
  explicit Piece(int64_t parts) : parts_(parts), left_(parts) {}
  virtual ~Piece() = default;
  Piece(const Piece&) = delete;

  // Asked until it says true. May throw; the parts are then left out.
  virtual bool is_there() = 0;
  virtual void run(int64_t part) = 0;
  // By the thread that has run the last part. `error`: what is_there() or a part has thrown first, or null.
  virtual void finish(std::exception_ptr error) = 0;

 private:
  friend class Workers;
  const int64_t parts_;
  std::atomic<int64_t> next_{0}, left_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

class Workers {
 public:
  Workers() = default;
  ~Workers();  // after the last piece
  Workers(const Workers&) = delete;

  // For so many threads, at least one. A piece has at least one part.
  void add(std::shared_ptr<Piece> piece, int threads);

 private:
  void work(int index);
  std::shared_ptr<Piece> first(int index);
  void take_from(Piece& piece);
  void drop(const std::shared_ptr<Piece>& piece);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Piece>> pieces_;  // with parts that nobody has taken
  int wanted_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// Keeps this thread on a processor that no other of these has, of those that the process may use. Where none is left,
// or several processes of a launcher use all of the machine (LOCAL_WORLD_SIZE), it may run on any of them.
class OnOwnProcessor {
 public:
  OnOwnProcessor();
  ~OnOwnProcessor();
  OnOwnProcessor(const OnOwnProcessor&) = delete;
  bool is_alone() const { return place_ >= 0; }

 private:
  int place_ = -1;  // among the processors of the process
};

}  // namespace precond
