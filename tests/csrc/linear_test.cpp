// Tests the CPU kernel of linear layers of every instruction set that this processor has against sums in double. Every
// buffer ends with its last element, so that the address sanitizer detects accesses beyond it.
#include "linear.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "dtypes.h"
#include "instruction_sets.h"
#include "testing.h"
#include "thread_workers.h"

using namespace sinkattn;

namespace {

template <typename scalar_t>
constexpr LinearType kType = std::is_same_v<scalar_t, float>  ? LinearType::kFloat
                             : std::is_same_v<scalar_t, Half> ? LinearType::kHalf
                                                              : LinearType::kBFloat16;
// Half an ulp of the result, as a fraction of it.
template <typename scalar_t>
constexpr double kRounding = std::is_same_v<scalar_t, float>  ? 0x1p-24
                             : std::is_same_v<scalar_t, Half> ? 0x1p-11
                                                              : 0x1p-8;

template <typename T>
std::vector<T> random_values(int64_t count, std::mt19937& random) {
  std::vector<T> out;
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, int8_t>) {
      out.push_back(static_cast<int8_t>(static_cast<int>(random() % 256) - 128));
    } else {
      out.push_back(T(static_cast<float>(random()) * 0x1p-31f - 1));
    }
  }
  return out;
}

template <typename T>
double value(const T& x) {
  return static_cast<double>(static_cast<float>(x));
}

template <typename weight_t, typename scalar_t>
struct Matrix {
  std::vector<weight_t> weight;
  std::vector<float> scale;
  std::vector<scalar_t> bias;
};

template <typename weight_t, typename scalar_t>
void test(
    const InstructionSet& set, const std::vector<int64_t>& rows_of, int64_t columns, int64_t tokens, bool with_bias) {
  std::mt19937 random(1);
  constexpr bool is_int8 = std::is_same_v<weight_t, int8_t>;
  std::vector<Matrix<weight_t, scalar_t>> matrices;
  std::vector<LinearMatrix> arguments;
  int64_t all_rows = 0;
  for (const int64_t rows : rows_of) {
    matrices.push_back(
        {random_values<weight_t>(rows * columns, random), random_values<float>(is_int8 ? rows : 0, random),
         random_values<scalar_t>(with_bias ? rows : 0, random)});
    all_rows += rows;
  }
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto& [weight, scale, bias] = matrices[i];
    arguments.push_back(
        {rows_of[i], weight.data(), is_int8 ? scale.data() : nullptr, with_bias ? bias.data() : nullptr});
  }
  const auto input = random_values<scalar_t>(tokens * columns, random);
  const auto multiply = [&](int64_t threads) {
    std::vector<scalar_t> out(tokens * all_rows, scalar_t(NAN));
    LinearCall call{kType<scalar_t>,  is_int8,      columns,   tokens, arguments.data(),
                    static_cast<int64_t>(arguments.size()), input.data(), out.data()};
    ThreadWorkers workers(threads);
    set.linear(call, workers);
    return out;
  };
  const std::vector<scalar_t> out = multiply(1), of_three = multiply(3);
  CHECK(out.empty() || std::memcmp(out.data(), of_three.data(), out.size() * sizeof(scalar_t)) == 0);
  for (int64_t token = 0; token < tokens; ++token) {
    const scalar_t* got = out.data() + token * all_rows;
    for (size_t i = 0; i < matrices.size(); ++i) {
      const auto& [weight, scale, bias] = matrices[i];
      for (int64_t row = 0; row < rows_of[i]; ++row, ++got) {
        double sum = 0, size = 0;
        for (int64_t column = 0; column < columns; ++column) {
          const double product = value(weight[row * columns + column]) * value(input[token * columns + column]);
          sum += product;
          size += std::abs(product);
        }
        const double factor = is_int8 ? scale[row] : 1.0, added = with_bias ? value(bias[row]) : 0.0;
        const double want = sum * factor + added;
        const double summation = (columns + 2) * 0x1p-24 * (size * std::abs(factor) + std::abs(added));
        CHECK(std::abs(value(*got) - want) <= summation + kRounding<scalar_t> * std::abs(want) * 1.001);
      }
    }
  }
}

template <typename scalar_t>
void test_all(const InstructionSet& set, const char* type) {
  const std::vector<std::pair<std::vector<int64_t>, int64_t>> shapes{
      {{1}, 1}, {{5}, 3}, {{16}, 64}, {{37}, 100}, {{261}, 577}, {{40, 0, 3, 261}, 133}, {{1, 1, 1}, 7}, {{0}, 5}};
  for (const auto& [rows, columns] : shapes) {
    std::string name;
    for (const int64_t each : rows) name += (name.empty() ? "" : "+") + std::to_string(each);
    for (int64_t tokens = 1; tokens <= kMaxLinearTokens; ++tokens) {
      for (const bool with_bias : {false, true}) {
        current_case = std::string(set.name) + ", " + type + ", " + name + " x " + std::to_string(columns) +
                       ", tokens " + std::to_string(tokens) + (with_bias ? ", bias" : "");
        test<scalar_t, scalar_t>(set, rows, columns, tokens, with_bias);
        current_case += ", int8";
        test<int8_t, scalar_t>(set, rows, columns, tokens, with_bias);
      }
    }
  }
}

}  // namespace

int main() {
  for (int i = 0; i < kNumInstructionSets; ++i) {
    const InstructionSet& set = kInstructionSets[i];
    if (!set.available()) continue;
    test_all<float>(set, "float");
    test_all<Half>(set, "half");
    test_all<BFloat16>(set, "bfloat16");
  }
  CHECK(ThreadWorkers::max_used == 3);
  std::puts("ok");
}
