// Threads, memory and the instruction set that the CPU operators give their kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>

#include "instruction_sets.h"
#include "require.h"

namespace sinkattn {

// Runs on torch's threads. The workspace belongs to the calling thread, is reused by later calls and only ever grows.
class TorchWorkers final : public Workers {
 public:
  int64_t max_workers() const override { return torch::stable::get_num_threads(); }

  void run(int64_t num_workers, void (*work)(void* context, int64_t worker), void* context) override {
    torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(context, worker);
    });
  }

  char* workspace(int64_t bytes) override {
    thread_local std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
    thread_local int64_t size = 0;
    if (bytes > size) {
      const int64_t rounded_bytes = (bytes + 4095) / 4096 * 4096;
      memory.reset(static_cast<char*>(std::aligned_alloc(64, rounded_bytes)));
      size = memory ? rounded_bytes : 0;
      require(memory != nullptr, "could not allocate a workspace of ", rounded_bytes, " bytes");
    }
    return memory.get();
  }
};

// The fastest instruction set that the processor has and that ATEN_CPU_CAPABILITY, which limits torch too, allows.
inline const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = [&]() -> const InstructionSet& {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    int first = 0;
    for (int i = 0; limit && i < kNumInstructionSets; ++i) {
      if (std::string(limit) == kInstructionSets[i].name) first = i;
    }
    while (!kInstructionSets[first].available()) ++first;
    return kInstructionSets[first];
  }();
  return chosen;
}

}  // namespace sinkattn
