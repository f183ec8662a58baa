// The instruction sets that the CPU kernels are compiled for, without torch: attention (attention.h) and linear layers
// (linear.h). instruction_sets.cpp defines the table.
#pragma once

#include <cstdint>

namespace sinkattn {

struct AttentionCall;
struct AttentionGradients;
struct LinearCall;

// Threads and memory that the caller provides to the kernel.
class Workers {
 public:
  virtual int64_t max_workers() const = 0;
  // Calls work(context, i) for every i in [0, num_workers), possibly in parallel, and returns when all have returned.
  virtual void run(int64_t num_workers, void (*work)(void* context, int64_t worker), void* context) = 0;
  // Uninitialised memory, aligned to 64 bytes, valid until the next call of workspace().
  virtual char* workspace(int64_t bytes) = 0;

 protected:
  ~Workers() = default;
};

struct InstructionSet {
  const char* name;
  bool (*available)();  // on this processor
  void (*attend)(const AttentionCall& call, Workers& workers);
  void (*differentiate)(const AttentionGradients& call, Workers& workers);
  void (*linear)(const LinearCall& call, Workers& workers);
};

// Fastest first; the last one is always available.
extern const InstructionSet kInstructionSets[];
extern const int kNumInstructionSets;

}  // namespace sinkattn
