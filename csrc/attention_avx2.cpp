// The CPU attention kernel for x86-64 processors with AVX2.
#if defined(__x86_64__)

#define SINKATTN_AVX2
#include "attention_kernel.h"

namespace sinkattn {

void attend_avx2(const AttentionCall& call, Workers& workers) { avx2::attend(call, workers); }

void differentiate_avx2(const AttentionGradients& call, Workers& workers) { avx2::differentiate(call, workers); }

}  // namespace sinkattn

#endif
