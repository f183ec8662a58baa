// The CPU attention kernel for x86-64 processors with AVX-512.
#if defined(__x86_64__)

#define SINKATTN_AVX512
#include "attention_kernel.h"

namespace sinkattn {

void attend_avx512(const AttentionCall& call, Workers& workers) { avx512::attend(call, workers); }

void differentiate_avx512(const AttentionGradients& call, Workers& workers) { avx512::differentiate(call, workers); }

}  // namespace sinkattn

#endif
