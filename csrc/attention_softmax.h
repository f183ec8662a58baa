// Online softmax (arXiv 1805.02867), softcap, ALiBi and sink logits, on blocks of scores. Included by attention_base.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd_math.h"

namespace sinkattn {
namespace SINKATTN_ISA {

template <typename acc_t>
constexpr acc_t kMinusInfinity = -std::numeric_limits<acc_t>::infinity();

// Running softmax of one query. Its output accumulator holds the sum of exp(score - max) * value.
template <typename acc_t>
struct SoftmaxState {
  acc_t max;  // largest score
  acc_t sum;  // sum of exp(score - max)
};

// Adds a block of scores s[0, count): replaces them by weights exp(s - max) and returns the factor by which the caller
// must rescale its accumulator. s[count, round_up(count, lanes)) is set to zero.
template <typename acc_t>
SINKATTN_INLINE acc_t update_softmax(SoftmaxState<acc_t>& state, acc_t* s, int count) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  const int padded = (count + lanes - 1) / lanes * lanes;
  for (int j = count; j < padded; ++j) s[j] = kMinusInfinity<acc_t>;
  V maxima = load(s);
  for (int j = lanes; j < padded; j += lanes) maxima = maximum(maxima, load(s + j));
  const acc_t old_max = state.max;
  state.max = std::max(old_max, reduce_max(maxima));
  // As long as all scores are -infinity, any finite base gives weights of zero; -infinity would give NaN.
  const acc_t base = state.max == kMinusInfinity<acc_t> ? 0 : state.max;
  V sum{};
  for (int j = 0; j < padded; j += lanes) {
    const V weight = exp(load(s + j) - base);
    store(s + j, weight);
    sum += weight;
  }
  const acc_t factor = old_max == base ? 1 : std::exp(old_max - base);
  state.sum = state.sum * factor + reduce_sum(sum);
  return factor;
}

// Applies softcap, then ALiBi to the scores of one query with consecutive keys. `distance` is the distance from the
// query to the first key; it decreases by one per key.
template <typename acc_t>
SINKATTN_INLINE void apply_softcap_and_alibi(acc_t* s, int count, acc_t softcap, acc_t slope, int64_t distance) {
  using V = Vec<acc_t>;
  V index;
  for (int i = 0; i < kLanes<acc_t>; ++i) index[i] = static_cast<acc_t>(i);
  for (int j = 0; j < count; j += kLanes<acc_t>) {
    V x = load(s + j);
    if (softcap != 0) x = softcap * tanh(x / softcap);
    if (slope != 0) x -= slope * (static_cast<acc_t>(distance - j) - index);
    store(s + j, x);
  }
}

// Adds a sink logit: a score without a value. Returns the factor by which the caller must rescale its accumulator.
template <typename acc_t>
SINKATTN_INLINE acc_t add_sink_logit(SoftmaxState<acc_t>& state, acc_t logit) {
  const acc_t max = std::max(state.max, logit);
  const acc_t base = max == kMinusInfinity<acc_t> ? 0 : max;
  const acc_t factor = std::exp(state.max - base);
  state = {max, state.sum * factor + std::exp(logit - base)};
  return factor;
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
