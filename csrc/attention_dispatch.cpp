// Which instruction sets this library holds a kernel for, and which of them this processor has.
#include "attention.h"

namespace sinkattn {

void attend_baseline(const AttentionCall& call, Workers& workers);
#if defined(__x86_64__)
void attend_avx2(const AttentionCall& call, Workers& workers);
void attend_avx512(const AttentionCall& call, Workers& workers);
#endif

namespace {

bool has_baseline() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

// Names as in torch.backends.cpu.get_cpu_capability(), in lower case.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, attend_avx512},
    {"avx2", has_avx2, attend_avx2},
#endif
    {"default", has_baseline, attend_baseline},
};
const int kInstructionSetCount = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

}  // namespace sinkattn
