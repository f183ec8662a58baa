// Rounding of vectors to 8 bits, as `quantise` and `hadamard` in sinkattn/reference.py specify it. CPU and CUDA operators
// compile this one definition, without fused multiply-add and with exact division, so all give the same bits.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "ring.h"

namespace sinkattn {

// What the largest element of a vector becomes.
template <typename stored_t>
constexpr float kLargestStored = 127;
template <>
constexpr float kLargestStored<Float8> = 448;

constexpr uint32_t kInfinityBits = 0x7f800000;

// The absolute value of a number as bits, whose order is that of the numbers; those of infinity and NaN come last.
SINKATTN_HOST_DEVICE inline uint32_t magnitude_of(float x) { return bits_of(x) & 0x7fffffff; }

// Scale of a vector whose largest element has this magnitude; NaN if an element is infinite or NaN. Vectors are scaled
// as if their largest element were no smaller than 2^-100: so scales are normal numbers.
template <typename stored_t>
SINKATTN_HOST_DEVICE inline float scale_of(uint32_t largest) {
  if (largest >= kInfinityBits) return float_of(0x7fc00000);
  const float x = float_of(largest);
  return (x < 0x1p-100f ? 0x1p-100f : x) / kLargestStored<stored_t>;
}

// x / scale, rounded. `largest` is that of the vector of x.
SINKATTN_HOST_DEVICE inline void quantise_element(int8_t& to, float x, float scale, uint32_t largest) {
  // Adding 1.5 * 2^23 rounds to an integer, in the last mantissa bits of the sum.
  const float shifted = (largest < kInfinityBits ? x / scale : 0) + 0x1.8p23f;
  to = static_cast<int8_t>(bits_of(shifted) - bits_of(0x1.8p23f));
}
SINKATTN_HOST_DEVICE inline void quantise_element(Float8& to, float x, float scale, uint32_t largest) {
  to = Float8(largest < kInfinityBits ? x / scale : 0);
}

// Elements of a block of the Hadamard transform: the largest power of two that divides the dimension.
SINKATTN_HOST_DEVICE constexpr int64_t hadamard_block(int64_t dim) { return dim & -dim; }

// Sum and difference of the pair (a, b), a step of the transform.
template <typename acc_t>
SINKATTN_HOST_DEVICE inline void add_and_subtract(acc_t& a, acc_t& b) {
  const acc_t x = a, y = b;
  a = x + y;
  b = x - y;
}

// Transforms a vector in place: with pairs of elements 1, 2, 4, ... apart, in each block.
template <typename acc_t>
inline void hadamard(acc_t* x, int64_t dim) {
  for (int64_t distance = 1; distance < hadamard_block(dim); distance *= 2) {
    for (int64_t first = 0; first < dim; first += 2 * distance) {
      for (int64_t i = first; i < first + distance; ++i) add_and_subtract(x[i], x[i + distance]);
    }
  }
}

// Rounds a vector and returns its scale.
template <typename stored_t, typename scalar_t>
inline float quantise(stored_t* out, const scalar_t* in, int64_t in_stride, int64_t dim) {
  uint32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t magnitude = magnitude_of(static_cast<float>(in[d * in_stride]));
    if (magnitude > largest) largest = magnitude;
  }
  const float scale = scale_of<stored_t>(largest);
  for (int64_t d = 0; d < dim; ++d) {
    quantise_element(out[d], static_cast<float>(in[d * in_stride]), scale, largest);
  }
  return scale;
}

}  // namespace sinkattn
