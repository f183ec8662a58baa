// Tests dtypes.h on every number of 8 or 16 bits and next to every rounding boundary, loads of 8 bits, the Hadamard
// transform, and simd_math.h against fp64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <vector>

#include "dtypes.h"
#include "eight_bit_reference.h"
#include "simd_math.h"
#include "testing.h"

using sinkattn::BFloat16;
using sinkattn::Float8;
using sinkattn::Half;
using sinkattn::RingType;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <typename T>
float value_of(int bits) {
  T x;
  x.bits = static_cast<uint16_t>(bits);
  return static_cast<float>(x);
}

// Value of a bit pattern without sign, by the definition of the format. The pattern of infinity has the value of the
// next number that the format would have.
double defined_value(int bits, int mantissa_bits) {
  const int one = 1 << mantissa_bits, bias = (1 << (14 - mantissa_bits)) - 1, exponent = bits / one;
  return std::ldexp(bits % one + (exponent ? one : 0), std::max(exponent, 1) - bias - mantissa_bits);
}

// Rounding is monotonic, so it is enough to test the midpoints between neighbours and the floats next to them.
template <typename T>
void check_type(const char* name, int mantissa_bits) {
  const int infinity = 0x7fff >> mantissa_bits << mantissa_bits;
  for (int bits = 0; bits < 0x8000; ++bits) {
    for (const int sign : {0, 0x8000}) {
      current_case = name + std::string(" number ") + std::to_string(sign | bits);
      const float x = value_of<T>(sign | bits);
      CHECK(std::signbit(x) == (sign != 0));
      if (bits > infinity) {
        CHECK(std::isnan(x));
        CHECK(std::isnan(value_of<T>(T(x).bits)));
        continue;
      }
      const double value = defined_value(bits, mantissa_bits);
      CHECK(std::abs(x) == (bits == infinity ? kInfinity : value));
      CHECK(T(x).bits == (sign | bits));
      if (bits == infinity) continue;
      const double halfway = (value + defined_value(bits + 1, mantissa_bits)) / 2;
      const float tie = static_cast<float>(sign ? -halfway : halfway);
      CHECK(std::abs(tie) == halfway);
      CHECK(T(tie).bits == (sign | (bits + bits % 2)));
      CHECK(T(std::nextafter(tie, 0.0f)).bits == (sign | bits));
      CHECK(T(std::nextafter(tie, 2 * tie)).bits == (sign | (bits + 1)));
    }
  }
}

Float8 float8_of(int bits) {
  Float8 x;
  x.bits = static_cast<uint8_t>(bits);
  return x;
}

void check_float8() {
  for (int bits = 0; bits < 0x80; ++bits) {
    for (const int sign : {0, 0x80}) {
      current_case = "fp8 number " + std::to_string(sign | bits);
      const float x = static_cast<float>(float8_of(sign | bits));
      CHECK(std::signbit(x) == (sign != 0));
      if (bits == 0x7f) {
        CHECK(std::isnan(x));
        CHECK((Float8(x).bits & 0x7f) == 0x7f);
        continue;
      }
      const double value = reference::magnitude_of_code(RingType::kFloat8, bits);
      CHECK(std::abs(x) == value);
      CHECK(Float8(x).bits == (sign | bits));
      if (bits == 0x7e) {
        for (const float more : {1.01f, 1.1f, 2.0f, 1e30f, kInfinity}) CHECK(Float8(x * more).bits == (sign | bits));
        continue;
      }
      const double halfway = (value + reference::magnitude_of_code(RingType::kFloat8, bits + 1)) / 2;
      const float tie = static_cast<float>(sign ? -halfway : halfway);
      CHECK(Float8(tie).bits == (sign | (bits + bits % 2)));
      CHECK(Float8(std::nextafter(tie, 0.0f)).bits == (sign | bits));
      CHECK(Float8(std::nextafter(tie, 2 * tie)).bits == (sign | (bits + 1)));
    }
  }
}

template <typename stored_t>
void check_loads(RingType type) {
  constexpr int lanes = sinkattn::baseline::kLanes<float>;
  for (int first = 0; first < 256; first += lanes) {
    uint8_t codes[lanes];
    for (int i = 0; i < lanes; ++i) codes[i] = static_cast<uint8_t>(first + i);
    const auto loaded = sinkattn::baseline::load(reinterpret_cast<const stored_t*>(codes));
    for (int i = 0; i < lanes; ++i) {
      current_case = "load of 8 bits, " + std::to_string(codes[i]);
      if (type == RingType::kFloat8 && (codes[i] & 0x7f) == 0x7f) continue;  // NaN, which a ring never holds
      CHECK(loaded[i] * sinkattn::baseline::kLoadScale<stored_t> == reference::number_of_code(type, codes[i]));
    }
  }
}

void check_hadamard() {
  for (const int dim : {1, 6, 7, 8, 64, 80, 128, 192}) {
    current_case = "Hadamard transform of " + std::to_string(dim);
    std::vector<float> x;
    for (int i = 0; i < dim; ++i) x.push_back(static_cast<float>(std::sin(i * i) * std::exp(i % 7)));
    size_t block = 0;
    const std::vector<float> expected = reference::hadamard_in_blocks(x, block);
    CHECK(sinkattn::hadamard_block(dim) == static_cast<int64_t>(block));
    std::vector<float> scalar = x, vectors = x;
    sinkattn::hadamard(scalar.data(), dim);
    sinkattn::baseline::hadamard_vector(vectors.data(), dim);
    CHECK(scalar == expected && vectors == expected);
    const std::vector<double> exact(expected.begin(), expected.end());
    const std::vector<double> back = reference::hadamard_in_blocks(exact, block);
    for (int i = 0; i < dim; ++i) CHECK(std::abs(back[i] / block - x[i]) < 1e-3);
  }
}

float exp(float x) { return sinkattn::baseline::exp(sinkattn::baseline::broadcast(x))[0]; }
float tanh(float x) { return sinkattn::baseline::tanh(sinkattn::baseline::broadcast(x))[0]; }

// Error in units of the last place.
double error(float got, double exact) {
  const float nearest = std::abs(static_cast<float>(exact));
  return std::abs(got - exact) / (std::nextafter(nearest, kInfinity) - nearest);
}

void check_functions() {
  constexpr uint32_t step = 4001, end = 0x7f800000;  // samples all magnitudes
  for (uint32_t bits = 0; bits < end; bits += step) {
    const float x = sinkattn::float_of(bits);
    current_case = "exp or tanh of about -" + std::to_string(x);
    const double exact = std::exp(-static_cast<double>(x));
    if (exact > 1.0001 * std::numeric_limits<float>::min()) CHECK(error(exp(-x), exact) < 1);
    if (exact < std::numeric_limits<float>::min()) CHECK(exp(-x) == 0);
    CHECK(error(tanh(x), std::tanh(static_cast<double>(x))) < 2);
    CHECK(tanh(-x) == -tanh(x));
  }
  current_case = "";
  CHECK(exp(0.0f) == 1 && exp(-kInfinity) == 0 && std::isnan(exp(kNaN)));
  CHECK(tanh(kInfinity) == 1 && tanh(-kInfinity) == -1 && std::isnan(tanh(kNaN)));
}

}  // namespace

int main() {
  check_type<Half>("fp16", 10);
  check_type<BFloat16>("bf16", 7);
  check_float8();
  check_loads<int8_t>(RingType::kInt8);
  check_loads<Float8>(RingType::kFloat8);
  check_hadamard();
  check_functions();
  std::puts("ok");
}
