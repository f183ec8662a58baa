// The fused kernel, compiled once for each instruction set (attention_*.cpp).
//
// Slots in storage order hold at most three runs of consecutive tokens, and softmax does not care for the order of
// keys: so keys are read as they lie, and what a query sees of a run is an interval of it.
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
#include "rotary.h"
// From here on code is compiled for the instruction set.
#include "simd.h"

#include "attention_chunk_microkernel.h"
#if defined(SINKATTN_AMX)
#include "attention_chunk_microkernel_amx.h"
#endif

#include "attention_chunk.h"
#include "attention_decode.h"

namespace sinkattn {
namespace SINKATTN_ISA {

constexpr int64_t kPackedQueries = 24;  // queries per key from which packing keys pays

template <typename scalar_t>
void attend_as(const AttentionCall& call, Workers& workers) {
  const bool append_first = call.tokens <= call.layout.headroom + 1;
  if (call.tokens == 1 || (append_first && call.tokens * (call.heads / call.kv_heads) < kPackedQueries)) {
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
#endif

}  // namespace SINKATTN_ISA
}  // namespace sinkattn

#if defined(__clang__) && (defined(SINKATTN_AVX512) || defined(SINKATTN_AVX2))
#pragma clang attribute pop
#endif
