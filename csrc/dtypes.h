// bfloat16, float16 and float8_e4m3fn as they are stored, without torch. Conversion to float is exact; conversion from
// float rounds to nearest even, as in torch.
#pragma once

#include <cstdint>
#include <cstring>

#include "ring.h"

namespace sinkattn {

SINKATTN_HOST_DEVICE inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

SINKATTN_HOST_DEVICE inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float x) {
    const uint32_t in = bits_of(x);
    const uint32_t rounded = (in + 0x7fff + ((in >> 16) & 1)) >> 16;
    bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
  }
  explicit operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
};

struct Half {
  uint16_t bits;

  Half() = default;
  explicit Half(float x) {
    const uint32_t in = bits_of(x), sign = (in >> 16) & 0x8000, magnitude = in & 0x7fffffff;
    // Below 2^-14 the result is subnormal: adding 1/2 rounds it, and leaves it in the last mantissa bits of the sum.
    const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t finite = magnitude < 0x38800000 ? small : magnitude < 0x47800000 ? normal : 0x7c00;
    bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : finite));
  }
  explicit operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
    // The exponent biases differ by 112; multiplying, unlike adding to the exponent, also normalises subnormals.
    const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
    return float_of(sign | ((bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite));
  }
};

// Has no infinity: what is beyond its largest number, 448, becomes that. NaN has all bits but the sign set.
struct Float8 {
  uint8_t bits;

  Float8() = default;
  SINKATTN_HOST_DEVICE explicit Float8(float x) {
    const uint32_t in = bits_of(x), sign = (in >> 24) & 0x80, magnitude = in & 0x7fffffff;
    // As in Half: below 2^-6 the result is subnormal, and adding 2^14 rounds it.
    const uint32_t small = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffff + ((magnitude >> 20) & 1)) >> 20;
    const uint32_t finite = magnitude < 0x3c800000 ? small : magnitude < 0x43e00000 ? normal : 0x7e;
    bits = static_cast<uint8_t>(sign | (magnitude > 0x7f800000 ? 0x7f : finite));
  }
  explicit operator float() const {
    const uint32_t sign = (bits & 0x80u) << 24, magnitude = (bits & 0x7fu) << 20;
    const uint32_t finite = bits_of(float_of(magnitude) * 0x1p120f);
    return float_of(sign | ((bits & 0x7f) == 0x7f ? 0x7fc00000 : finite));
  }
};

}  // namespace sinkattn
