// Implementation of the CPU attention kernel (attention.h). Each attention_<set>.cpp includes it to compile it for one
// instruction set. It includes, directly or not, all headers that are compiled per instruction set:
//
//   attention_decode.h   few queries per KV head, over attention_decode_microkernel.h and, on AMX, ..._amx.h
//   attention_chunk.h    many queries per KV head, over attention_chunk_microkernel.h and, on AMX, ..._amx.h
//   attention_backward.h gradients, over attention_chunk_microkernel.h
//   attention_base.h     base class of the three; attention_softmax.h: online softmax
//   simd.h, simd_math.h  vectors of the instruction set
//
// The slots, in storage order, hold at most three runs of consecutive tokens, and softmax does not depend on the order
// of keys. So keys are read in storage order, and the tokens of a run that a query sees form an interval.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "attention.h"
#include "dtypes.h"
#include "instruction_sets.h"
#include "quantise.h"
#include "rotary.h"
// From here on, code is compiled for the instruction set: other headers must be included above.
#include "simd.h"

#include "attention_chunk_microkernel.h"
#if defined(SINKATTN_AMX)
#include "attention_chunk_microkernel_amx.h"
#include "attention_decode_microkernel_amx.h"
#endif

#include "attention_backward.h"
#include "attention_chunk.h"
#include "attention_decode.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kMinPackedQueries = 32;  // queries per KV head from which on packing keys is worth its cost

template <typename scalar_t>
void attend_as(const AttentionCall& call, Workers& workers) {
  const bool can_append_first = call.tokens <= call.layout.headroom + 1;  // as Decode requires
  if (call.tokens == 1 || (can_append_first && call.tokens * (call.heads / call.kv_heads) < kMinPackedQueries)) {
    Decode<scalar_t>(call, workers).run();
  } else {
    Chunk<scalar_t>(call, workers).run();
  }
}

#if !defined(SINKATTN_AMX)
inline void attend(const AttentionCall& call, Workers& workers) {
  switch (call.type) {
    case CacheType::kFloat: return attend_as<float>(call, workers);
    case CacheType::kDouble: return attend_as<double>(call, workers);
    case CacheType::kHalf: return attend_as<Half>(call, workers);
    case CacheType::kBFloat16: return attend_as<BFloat16>(call, workers);
  }
}

inline void differentiate(const AttentionGradients& call, Workers& workers) {
  switch (call.forward.type) {
    case CacheType::kFloat: return Backward<float>(call, workers).run();
    case CacheType::kDouble: return Backward<double>(call, workers).run();
    case CacheType::kHalf: return Backward<Half>(call, workers).run();
    case CacheType::kBFloat16: return Backward<BFloat16>(call, workers).run();
  }
}
#endif

}  // namespace SINKATTN_ISA
}  // namespace sinkattn

#if defined(__clang__) && (defined(SINKATTN_AVX512) || defined(SINKATTN_AVX2))
#pragma clang attribute pop
#endif
