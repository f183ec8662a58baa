// Rounding of vectors to 8 bits, as `quantise` and `hadamard` in sinkattn/reference.py specify it. CPU and CUDA operators
// compile this one definition, without fused multiply-add and with exact division, so all give the same bits.
#pragma once

#include <cstdint>
#include <type_traits>

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

// The integer next to x, which is less than 2^22; of two as near, the even one.
SINKATTN_HOST_DEVICE inline int32_t nearest_integer(float x) {
  // The sum has no bits for a fraction, so it is rounded to an integer, in its last mantissa bits.
  return static_cast<int32_t>(bits_of(x + 0x1.8p23f) - bits_of(0x1.8p23f));
}

// x / scale, rounded. `largest` is that of the vector of x.
SINKATTN_HOST_DEVICE inline void quantise_element(int8_t& to, float x, float scale, uint32_t largest) {
  to = static_cast<int8_t>(nearest_integer(largest < kInfinityBits ? x / scale : 0));
}
SINKATTN_HOST_DEVICE inline void quantise_element(Float8& to, float x, float scale, uint32_t largest) {
  to = Float8(largest < kInfinityBits ? x / scale : 0);
}

// int8 vectors of up to kShortDim elements get the best of kNumScales scales: that of scale_of, and larger ones. But
// not those with an element of magnitude kTooLargeForChoice: with a larger scale it may become infinite in float16.
constexpr int kShortDim = 32, kNumScales = 16;
constexpr uint32_t kTooLargeForChoice = 0x47000000;  // 2^15
template <typename stored_t>
SINKATTN_HOST_DEVICE constexpr bool has_choice_of_scales(int64_t dim) {
  return std::is_same_v<stored_t, int8_t> && dim <= kShortDim;
}

// By what the first of them is multiplied.
SINKATTN_HOST_DEVICE inline float scale_factor(int k) { return static_cast<float>(128 + k) / 128; }

// The smaller, the better is scale k for a vector; no two scales have the same. `scaled(d)` is an element divided by
// the first scale. Errors are counted in 32nds of scale k: integers, so that their order does not matter.
template <typename Scaled>
SINKATTN_HOST_DEVICE inline uint32_t rank_of_scale(int k, int64_t dim, const Scaled& scaled) {
  uint32_t squares = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = scaled(d) / scale_factor(k);
    const int32_t error = nearest_integer(x * 32) - nearest_integer(x) * 32;
    squares += static_cast<uint32_t>(error * error);
  }
  return squares * static_cast<uint32_t>((128 + k) * (128 + k) * kNumScales) + static_cast<uint32_t>(k);
}
SINKATTN_HOST_DEVICE inline int scale_of_rank(uint32_t rank) { return static_cast<int>(rank % kNumScales); }

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
  float scale = scale_of<stored_t>(largest);
  if (has_choice_of_scales<stored_t>(dim) && largest < kTooLargeForChoice) {
    float scaled[kShortDim];
    for (int64_t d = 0; d < dim; ++d) scaled[d] = static_cast<float>(in[d * in_stride]) / scale;
    uint32_t best = UINT32_MAX;
    for (int k = 0; k < kNumScales; ++k) {
      const uint32_t rank = rank_of_scale(k, dim, [&](int64_t d) { return scaled[d]; });
      if (rank < best) best = rank;
    }
    scale *= scale_factor(scale_of_rank(best));
  }
  for (int64_t d = 0; d < dim; ++d) {
    quantise_element(out[d], static_cast<float>(in[d * in_stride]), scale, largest);
  }
  return scale;
}

}  // namespace sinkattn
