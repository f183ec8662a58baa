// Rounding to 8 bits by definition, independent of the kernel: the nearest of all numbers of the type. Included by
// attention_reference.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention.h"

namespace reference {

// Value of the bits of a number without its sign, which are in the order of the values.
inline double magnitude_of_code(sinkattn::RingType type, int code) {
  if (type == sinkattn::RingType::kInt8) return code;
  const int exponent = code / 8, mantissa = code % 8;
  return exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
}

inline int largest_code(sinkattn::RingType type) { return type == sinkattn::RingType::kInt8 ? 127 : 126; }

inline double number_of_code(sinkattn::RingType type, uint8_t code) {
  if (type == sinkattn::RingType::kInt8) return static_cast<int8_t>(code);
  return (code & 0x80 ? -1 : 1) * magnitude_of_code(type, code & 0x7f);
}

// The number of the type next to x; of two as near, the one whose last bit is 0.
inline uint8_t nearest_code(sinkattn::RingType type, double x) {
  const double magnitude = std::abs(x);
  int code = 0, above = largest_code(type);  // the numbers on both sides
  while (above - code > 1) {
    const int middle = (code + above) / 2;
    (magnitude_of_code(type, middle) <= magnitude ? code : above) = middle;
  }
  const double below = magnitude - magnitude_of_code(type, code), beyond = magnitude_of_code(type, above) - magnitude;
  if (beyond < below || (beyond == below && code % 2)) code = above;
  if (!std::signbit(x)) return static_cast<uint8_t>(code);
  return static_cast<uint8_t>(type == sinkattn::RingType::kInt8 ? -code : code | 0x80);
}

// The product with a Hadamard matrix, by its recursive definition; `T` is the type of the sums.
template <typename T>
std::vector<T> hadamard(const std::vector<T>& x) {
  const size_t half = x.size() / 2;
  if (half == 0) return x;
  std::vector<T> a = hadamard(std::vector<T>(x.begin(), x.begin() + half));
  const std::vector<T> b = hadamard(std::vector<T>(x.begin() + half, x.end()));
  for (size_t i = 0; i < half; ++i) a.push_back(a[i] - b[i]);
  for (size_t i = 0; i < half; ++i) a[i] += b[i];
  return a;
}

// In blocks of the largest power of two that divides the dimension, `block`.
template <typename T>
std::vector<T> hadamard_in_blocks(const std::vector<T>& x, size_t& block) {
  for (block = 1; block < x.size() && x.size() % (2 * block) == 0;) block *= 2;
  std::vector<T> out;
  for (size_t i = 0; i < x.size(); i += block) {
    for (const T y : hadamard(std::vector<T>(x.begin() + i, x.begin() + i + block))) out.push_back(y);
  }
  return out;
}

// Which of 128/128, 129/128, ... 143/128 times a scale gives int8 vectors the least squared error, counted in 32nds of
// that scale; of several, the smallest.
inline float best_factor(const std::vector<float>& x, float scale) {
  float best = 1;
  double least = std::numeric_limits<double>::infinity();
  for (double factor = 1; factor < 144 / 128.0; factor += 1 / 128.0) {
    double squares = 0;
    for (const float element : x) {
      const float scaled = static_cast<float>(static_cast<float>(element / static_cast<double>(scale)) / factor);
      const double error = std::nearbyint(scaled * 32) - 32 * std::nearbyint(scaled);
      squares += error * error;
    }
    if (squares * factor * factor >= least) continue;
    least = squares * factor * factor;
    best = static_cast<float>(factor);
  }
  return best;
}

// A vector as a ring of 8 bits holds it.
struct Held {
  std::vector<uint8_t> codes;
  float scale;
  std::vector<double> values;  // what queries see
};

inline Held hold(sinkattn::RingType type, std::vector<float> x, bool is_key) {
  size_t block = 1;
  if (is_key) x = hadamard_in_blocks(x, block);
  bool finite = true;
  float largest = 0x1p-100f;
  for (const float element : x) {
    finite &= std::isfinite(element);
    largest = std::max(largest, std::abs(element));
  }
  // Division in fp64, rounded again to fp32, is exact division in fp32: fp64 has more than twice the bits.
  const auto divide = [](float a, double b) { return static_cast<float>(a / b); };
  Held held{{}, divide(largest, magnitude_of_code(type, largest_code(type))), {}};
  if (!finite) held.scale = std::numeric_limits<float>::quiet_NaN();
  const bool has_choice = finite && largest < 32768 && type == sinkattn::RingType::kInt8 && x.size() <= 32;
  if (has_choice) held.scale *= best_factor(x, held.scale);
  for (const float element : x) {
    held.codes.push_back(finite ? nearest_code(type, divide(element, held.scale)) : 0);
    held.values.push_back(number_of_code(type, held.codes.back()) * held.scale);
  }
  if (is_key) held.values = hadamard_in_blocks(held.values, block);
  for (double& value : held.values) value /= block;
  return held;
}

}  // namespace reference
