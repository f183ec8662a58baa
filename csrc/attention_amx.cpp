// The CPU attention kernel for x86-64 processors with AMX: bfloat16 is compiled for AMX, other dtypes use AVX-512.
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
