// The parts of CUDA C++ that ring_cache_kernels.cuh uses, emulated on the host. Include it before the kernels.
#pragma once

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // correct as blocks with shared memory run one at a time

struct uint3 {
  unsigned int x, y, z;
};
inline thread_local uint3 threadIdx{}, blockIdx{};
inline uint3 blockDim{}, gridDim{};

namespace emulation {

// Barrier of the threads of a block, for __syncthreads.
class Barrier {
 public:
  explicit Barrier(unsigned int threads) : threads_(threads) {}

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned int generation = generation_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++generation_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return generation_ != generation; });
    }
  }

 private:
  const unsigned int threads_;
  unsigned int waiting_ = 0, generation_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
};
inline Barrier* barrier = nullptr;

// Runs a kernel whose threads do not synchronise, on two host threads. Neighbouring CUDA threads, and the same thread
// of neighbouring blocks, run on different host threads, so that the thread sanitizer detects when two access the same
// address. CUDA threads run in ascending order, or descending if `backward`.
template <typename Kernel>
void run(unsigned int across, unsigned int down, unsigned int threads, bool backward, const Kernel& kernel) {
  constexpr unsigned int kHostThreads = 2;
  blockDim = {threads, 1, 1};
  gridDim = {across, down, 1};
  const unsigned int count = across * down * threads;
  std::vector<std::thread> running;
  for (unsigned int host_thread = 0; host_thread < kHostThreads; ++host_thread) {
    running.emplace_back([=, &kernel] {
      for (unsigned int i = 0; i < count; ++i) {
        const unsigned int at = backward ? count - 1 - i : i, block = at / threads;
        if ((at % threads + block) % kHostThreads != host_thread) continue;
        threadIdx = {at % threads, 0, 0};
        blockIdx = {block % across, block / across, 0};
        kernel();
      }
    });
  }
  for (std::thread& thread : running) thread.join();
}

// Runs a kernel whose threads synchronise, block by block, each thread of a block on a host thread of its own.
template <typename Kernel>
void run_blocks(unsigned int across, unsigned int down, unsigned int threads, const Kernel& kernel) {
  blockDim = {threads, 1, 1};
  gridDim = {across, down, 1};
  for (unsigned int block = 0; block < across * down; ++block) {
    Barrier all(threads);
    barrier = &all;
    std::vector<std::thread> running;
    for (unsigned int thread = 0; thread < threads; ++thread) {
      running.emplace_back([=, &kernel] {
        threadIdx = {thread, 0, 0};
        blockIdx = {block % across, block / across, 0};
        kernel();
      });
    }
    for (std::thread& thread : running) thread.join();
    barrier = nullptr;
  }
}

// The same with one block.
template <typename Kernel>
void run_block(unsigned int threads, const Kernel& kernel) {
  run_blocks(1, 1, threads, kernel);
}

}  // namespace emulation

inline void __syncthreads() {
  if (!emulation::barrier) {
    std::fputs("__syncthreads outside run_blocks\n", stderr);
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
