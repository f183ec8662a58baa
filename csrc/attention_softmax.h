// Softmax over scores that come block by block (online softmax, arXiv 1805.02867).
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

// Softmax so far of one query.
template <typename acc_t>
struct Softmax {
  acc_t top;    // largest score
  acc_t total;  // sum of exp(score - top)
};

// Turns the scores s[0, count) into weights exp(s - top) and returns the factor on everything summed before.
// s[count, round_up(count, lanes)) is overwritten with zeros.
template <typename acc_t>
SINKATTN_INLINE acc_t update(Softmax<acc_t>& state, acc_t* s, int count) {
  using V = Vec<acc_t>;
  constexpr int lanes = kLanes<acc_t>;
  const int padded = (count + lanes - 1) / lanes * lanes;
  for (int j = count; j < padded; ++j) s[j] = kMinusInfinity<acc_t>;
  V tops = load(s);
  for (int j = lanes; j < padded; j += lanes) tops = maximum(tops, load(s + j));
  const acc_t before = state.top;
  state.top = std::max(before, largest(tops));
  // If no score counts yet, any base will do: every weight is exp(-infinity).
  const acc_t base = state.top == kMinusInfinity<acc_t> ? 0 : state.top;
  V total{};
  for (int j = 0; j < padded; j += lanes) {
    const V weight = exp(load(s + j) - base);
    store(s + j, weight);
    total += weight;
  }
  const acc_t factor = before == base ? 1 : std::exp(before - base);
  state.total = state.total * factor + sum(total);
  return factor;
}

// Soft cap and ALiBi on the scores of one query; `distance` is that of the first key, and falls by one per key.
template <typename acc_t>
SINKATTN_INLINE void adjust(acc_t* s, int count, acc_t softcap, acc_t slope, int64_t distance) {
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

// Takes in a score that has no value; returns the factor on everything summed before.
template <typename acc_t>
SINKATTN_INLINE acc_t add_logit(Softmax<acc_t>& state, acc_t logit) {
  const acc_t top = std::max(state.top, logit);
  const acc_t base = top == kMinusInfinity<acc_t> ? 0 : top;
  const acc_t factor = std::exp(state.top - base);
  state = {top, state.total * factor + std::exp(logit - base)};
  return factor;
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
