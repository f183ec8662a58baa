// The CPU kernel of linear layers for x86-64 processors with AVX2.
#if defined(__x86_64__)

#define SINKATTN_AVX2
#include "linear_kernel.h"

namespace sinkattn {

void linear_avx2(const LinearCall& call, Workers& workers) { avx2::linear(call, workers); }

}  // namespace sinkattn

#endif
