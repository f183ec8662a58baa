// The fused kernel for x86-64 processors that multiply matrices of bfloat16 (AMX); all else as with AVX-512.
#if defined(__x86_64__)

#define SINKATTN_AMX
#include "attention_kernel.h"

namespace sinkattn {

void attend_avx512(const AttentionCall& call, Workers& workers);

void attend_amx(const AttentionCall& call, Workers& workers) {
  if (call.type == CacheType::kBFloat16) return amx::attend_as<BFloat16>(call, workers);
  attend_avx512(call, workers);
}

}  // namespace sinkattn

#endif
