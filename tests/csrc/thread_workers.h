// The threads and memory that tests give to the CPU kernels.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "instruction_sets.h"
#include "testing.h"

// Workers on threads of their own, which all start before any of them works. The workspace has exactly the requested
// size.
class ThreadWorkers final : public sinkattn::Workers {
 public:
  explicit ThreadWorkers(int64_t count) : count_(count) {}
  ThreadWorkers(const ThreadWorkers&) = delete;
  ~ThreadWorkers() { ::operator delete(memory_, kAlignment); }

  int64_t max_workers() const override { return count_; }

  void run(int64_t num_workers, void (*work)(void* context, int64_t worker), void* context) override {
    CHECK(num_workers >= 1 && num_workers <= count_);
    max_used = std::max(max_used, num_workers);
    std::atomic<int64_t> not_started{num_workers};
    const auto start = [&](int64_t worker) {
      --not_started;
      while (not_started > 0) std::this_thread::yield();
      work(context, worker);
    };
    std::vector<std::thread> others;
    for (int64_t worker = 1; worker < num_workers; ++worker) others.emplace_back(start, worker);
    start(0);
    for (std::thread& other : others) other.join();
  }

  char* workspace(int64_t bytes) override {
    ::operator delete(memory_, kAlignment);
    memory_ = static_cast<char*>(::operator new(bytes, kAlignment));
    std::memset(memory_, 0xff, bytes);  // NaN in any type
    return memory_;
  }

  static inline int64_t max_used = 0;  // most workers that any call used

 private:
  static constexpr std::align_val_t kAlignment{64};
  const int64_t count_;
  char* memory_ = nullptr;
};
