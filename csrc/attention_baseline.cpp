// The CPU attention kernel for every processor: SSE2 on x86-64, NEON on arm64.
#include "attention_kernel.h"

namespace sinkattn {

void attend_baseline(const AttentionCall& call, Workers& workers) { baseline::attend(call, workers); }

void differentiate_baseline(const AttentionGradients& call, Workers& workers) {
  baseline::differentiate(call, workers);
}

}  // namespace sinkattn
