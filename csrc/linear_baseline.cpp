// The CPU kernel of linear layers for every processor: SSE2 on x86-64, NEON on arm64.
#include "linear_kernel.h"

namespace sinkattn {

void linear_baseline(const LinearCall& call, Workers& workers) { baseline::linear(call, workers); }

}  // namespace sinkattn
