// Tests dtypes.h on every 16-bit number and next to every rounding boundary, and simd_math.h against fp64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>

#include "dtypes.h"
#include "simd_math.h"
#include "testing.h"

using sinkattn::BFloat16;
using sinkattn::Half;

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
  check_functions();
  std::puts("ok");
}
