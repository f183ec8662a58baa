// As much of CUDA C++ as the kernels here use, on the host. Include it before a header of kernels.
#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks run one after another

struct uint3 {
  unsigned int x, y, z;
};
inline thread_local uint3 threadIdx{}, blockIdx{};
inline uint3 blockDim{}, gridDim{};

namespace emulation {

// Where the threads of a block wait for each other.
class Barrier {
 public:
  explicit Barrier(unsigned int threads) : threads_(threads) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned int turn = turn_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++turn_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return turn_ != turn; });
    }
  }

 private:
  const unsigned int threads_;
  unsigned int waiting_ = 0, turn_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};
inline Barrier* barrier = nullptr;

// A kernel whose threads know nothing of each other. Two real threads share them, so that neighbours, and the same
// thread of neighbouring blocks, run in different ones: the thread sanitizer sees where two touch one address. Each
// begins with the first or with the last.
template <typename Kernel>
void run(unsigned int across, unsigned int down, unsigned int threads, bool backward, const Kernel& kernel) {
  constexpr unsigned int kReal = 2;
  blockDim = {threads, 1, 1};
  gridDim = {across, down, 1};
  const unsigned int count = across * down * threads;
  std::vector<std::thread> running;
  for (unsigned int real = 0; real < kReal; ++real) {
    running.emplace_back([=, &kernel] {
      for (unsigned int i = 0; i < count; ++i) {
        const unsigned int at = backward ? count - 1 - i : i, block = at / threads;
        if ((at % threads + block) % kReal != real) continue;
        threadIdx = {at % threads, 0, 0};
        blockIdx = {block % across, block / across, 0};
        kernel();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

// A kernel of one block whose threads wait for each other: real threads.
template <typename Kernel>
void run_block(unsigned int threads, const Kernel& kernel) {
  blockDim = {threads, 1, 1};
  gridDim = {1, 1, 1};
  Barrier all(threads);
  barrier = &all;
  std::vector<std::thread> running;
  for (unsigned int thread = 0; thread < threads; ++thread) {
    running.emplace_back([&kernel, thread] {
      threadIdx = {thread, 0, 0};
      kernel();
    });
  }
  for (std::thread& thread : running) thread.join();
  barrier = nullptr;
}

}  // namespace emulation

inline void __syncthreads() {
  if (!emulation::barrier) {
    std::fputs("__syncthreads outside run_block\n", stderr);
    std::exit(1);
  }
  emulation::barrier->wait();
}

inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  unsigned long long old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
