// The CPU kernel of linear layers for x86-64 processors with AVX-512.
#if defined(__x86_64__)

#define SINKATTN_AVX512
#include "linear_kernel.h"

namespace sinkattn {

void linear_avx512(const LinearCall& call, Workers& workers) { avx512::linear(call, workers); }

}  // namespace sinkattn

#endif
