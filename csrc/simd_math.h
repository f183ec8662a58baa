// Reductions, exp, tanh and the Hadamard transform on SIMD vectors (simd.h).
#pragma once

#include <cmath>
#include <cstdint>

#include "quantise.h"
// From here on, code is compiled for the instruction set: other headers must be included above.
#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

template <typename V>
SINKATTN_INLINE V maximum(V a, V b) {
  return b > a ? b : a;
}

template <int Step, typename V>
SINKATTN_INLINE V reduce_max_lanes(V x) {
  x = maximum(x, swap_lanes<Step>(x));
  if constexpr (Step > 1) x = reduce_max_lanes<Step / 2>(x);
  return x;
}

template <int Step, typename V>
SINKATTN_INLINE V reduce_sum_lanes(V x) {
  x += swap_lanes<Step>(x);
  if constexpr (Step > 1) x = reduce_sum_lanes<Step / 2>(x);
  return x;
}

template <typename V>
SINKATTN_INLINE auto reduce_max(V x) {
  return reduce_max_lanes<sizeof(V) / sizeof(x[0]) / 2>(x)[0];
}

template <typename V>
SINKATTN_INLINE auto reduce_sum(V x) {
  return reduce_sum_lanes<sizeof(V) / sizeof(x[0]) / 2>(x)[0];
}

template <int Step = 1, typename V>
SINKATTN_INLINE V hadamard_lanes(V x) {
  constexpr int lanes = sizeof(V) / sizeof(x[0]);
  V sign{};
  for (int i = 0; i < lanes; ++i) sign[i] = i & Step ? -1 : 1;
  x = swap_lanes<Step>(x) + x * sign;  // sums and differences
  if constexpr (2 * Step < lanes) x = hadamard_lanes<2 * Step>(x);
  return x;
}

// The same as hadamard (quantise.h), bit for bit.
template <typename acc_t>
SINKATTN_INLINE void hadamard_vector(acc_t* x, int64_t dim) {
  constexpr int lanes = kLanes<acc_t>;
  if (hadamard_block(dim) < lanes) return hadamard(x, dim);
  for (int64_t d = 0; d < dim; d += lanes) store(x + d, hadamard_lanes(load(x + d)));
  for (int64_t distance = lanes; distance < hadamard_block(dim); distance *= 2) {
    for (int64_t first = 0; first < dim; first += 2 * distance) {
      for (int64_t i = first; i < first + distance; i += lanes) {
        const Vec<acc_t> a = load(x + i), b = load(x + i + distance);
        store(x + i, a + b);
        store(x + i + distance, a - b);
      }
    }
  }
}

// exp(x) for x <= 0; results below the smallest normal number are flushed to zero.
SINKATTN_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  constexpr float lowest = -87.336544f;  // log(2^-126)
  const V bounded = x < lowest ? broadcast(lowest) : x;
  // x = n log 2 + r, |r| <= log(2) / 2: adding 1.5 * 2^23 rounds to an integer, n, in the last mantissa bits.
  const V shifted = multiply_add(bounded, broadcast(1.44269504f), broadcast(12582912.0f));
  const V n = shifted - 12582912.0f;
  V r = multiply_add(n, broadcast(-0.693359375f), bounded);
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  // exp(r) = 1 + r + r^2 p(r); p is a minimax polynomial, relative error 3e-9.
  V p = multiply_add(broadcast(1.38145986e-3f), r, broadcast(8.36871688e-3f));
  p = multiply_add(p, r, broadcast(4.16683880e-2f));
  p = multiply_add(p, r, broadcast(1.66665206e-1f));
  p = multiply_add(p, r, broadcast(4.99999934e-1f));
  const V mantissa = multiply_add(p, r * r, r) + 1.0f;
  const V power = bit_cast<V>((bit_cast<IntVec>(shifted) << 23) + (127 << 23));
  return x < lowest ? V{} : mantissa * power;
}

SINKATTN_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

SINKATTN_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  const V magnitude = x < 0.0f ? -x : x;
  const V e = exp(-2.0f * magnitude);
  const V far = (1.0f - e) / (1.0f + e);
  // Near zero, where 1 - e cancels: x + x^3 p(x^2), relative error 4e-9 up to 0.625.
  const V z = x * x;
  V p = multiply_add(broadcast(-5.70498699e-3f), z, broadcast(2.06390872e-2f));
  p = multiply_add(p, z, broadcast(-5.37397151e-2f));
  p = multiply_add(p, z, broadcast(1.33314422e-1f));
  p = multiply_add(p, z, broadcast(-3.33332819e-1f));
  const V near = multiply_add(x * z, p, x);
  return magnitude < 0.625f ? near : x < 0.0f ? -far : far;
}

SINKATTN_INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn
