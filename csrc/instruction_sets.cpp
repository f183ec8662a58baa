// Table of the instruction sets that the CPU kernels are compiled for, with the test whether the processor has each.
#include "instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sinkattn {

void attend_baseline(const AttentionCall& call, Workers& workers);
void differentiate_baseline(const AttentionGradients& call, Workers& workers);
void linear_baseline(const LinearCall& call, Workers& workers);
#if defined(__x86_64__)
void attend_avx2(const AttentionCall& call, Workers& workers);
void differentiate_avx2(const AttentionGradients& call, Workers& workers);
void linear_avx2(const LinearCall& call, Workers& workers);
void attend_avx512(const AttentionCall& call, Workers& workers);
void differentiate_avx512(const AttentionGradients& call, Workers& workers);
void linear_avx512(const LinearCall& call, Workers& workers);
void attend_amx(const AttentionCall& call, Workers& workers);
#endif

namespace {

bool has_baseline() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_amx() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512() || !__builtin_cpu_supports("avx512vnni")) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tiles = (edx >> 24 & 1) && (edx >> 25 & 1) && (edx >> 22 & 1);  // AMX-TILE, AMX-INT8, AMX-BF16
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  if (!tiles || !(eax >> 5 & 1)) return false;  // AVX512-BF16
  // Linux grants the tile registers on request (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

// Names as in torch.backends.cpu.get_cpu_capability(), in lower case.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"amx", has_amx, attend_amx, differentiate_avx512, linear_avx512},
    {"avx512", has_avx512, attend_avx512, differentiate_avx512, linear_avx512},
    {"avx2", has_avx2, attend_avx2, differentiate_avx2, linear_avx2},
#endif
    {"default", has_baseline, attend_baseline, differentiate_baseline, linear_baseline},
};
const int kNumInstructionSets = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);

}  // namespace sinkattn
