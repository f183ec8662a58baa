// Implementation of the CPU kernel of linear layers (linear.h). Each linear_<set>.cpp includes it to compile it for one
// instruction set.
//
// With few tokens the time goes into reading the weights. Each worker reads its rows once, in the order in which they
// lie in memory, and multiplies them with all tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "dtypes.h"
#include "instruction_sets.h"
#include "linear.h"
// From here on, code is compiled for the instruction set: other headers must be included above.
#include "simd.h"

namespace sinkattn {
namespace SINKATTN_ISA {

using Floats = Vec<float>;
constexpr int64_t kFloats = kLanes<float>;

constexpr int64_t kMinWorkerWeightBytes = 1 << 16;  // a thread with fewer bytes to read costs more than it saves
constexpr int64_t kPrefetchBytes = 4096;            // the processor's own prefetching stops at the end of a page

template <>
struct VectorIO<int8_t> {
  static SINKATTN_INLINE Floats load(const int8_t* from) {
#if defined(SINKATTN_AVX512)
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Floats)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, x));
#elif defined(SINKATTN_AVX2)
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    VectorOf<int8_t, SINKATTN_VECTOR_BYTES / 4>::type x;
    std::memcpy(&x, from, sizeof x);
    return __builtin_convertvector(x, Floats);
#endif
  }
};

template <typename weight_t, typename scalar_t>
class Linear {
 public:
  Linear(const LinearCall& call, Workers& workers)
      : call_(call), workers_(workers), input_stride_(round_up(call.columns, kFloats)) {}

  void run() {
    convert_input();
    const int64_t bytes = call_.rows * call_.columns * static_cast<int64_t>(sizeof(weight_t));
    num_workers_ = std::max<int64_t>(1, std::min(bytes / kMinWorkerWeightBytes, workers_.max_workers()));
    workers_.run(
        num_workers_, [](void* self, int64_t worker) { static_cast<const Linear*>(self)->work(worker); }, this);
  }

 private:
  static constexpr int64_t kRowsAtOnce = 4;

  // To fp32, padded with zeros to whole vectors.
  void convert_input() {
    float* to = reinterpret_cast<float*>(workers_.workspace(call_.tokens * input_stride_ * sizeof(float)));
    input_ = to;
    for (int64_t token = 0; token < call_.tokens; ++token, to += input_stride_) {
      const scalar_t* from = static_cast<const scalar_t*>(call_.input) + token * call_.columns;
      for (int64_t i = 0; i < call_.columns; ++i) to[i] = static_cast<float>(from[i]);
      std::fill(to + call_.columns, to + input_stride_, 0.0f);
    }
  }

  void work(int64_t worker) const {
    const int64_t blocks = (call_.rows + kFloats - 1) / kFloats;
    const int64_t begin = blocks * worker / num_workers_, end = blocks * (worker + 1) / num_workers_;
    for (int64_t block = begin; block < end; ++block) {
      switch (call_.tokens) {
        case 1: multiply_block<1>(block * kFloats); break;
        case 2: multiply_block<2>(block * kFloats); break;
        case 3: multiply_block<3>(block * kFloats); break;
        default: multiply_block<kMaxLinearTokens>(block * kFloats);
      }
    }
  }

  template <int Tokens>
  void multiply_block(int64_t first) const {
    const int64_t rows = std::min(kFloats, call_.rows - first);
    const weight_t* weight = static_cast<const weight_t*>(call_.weight) + first * call_.columns;
    Floats sums[Tokens][kFloats] = {};
    int64_t row = 0;
    for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) multiply_rows<kRowsAtOnce>(row, weight, sums);
    for (; row < rows; ++row) multiply_rows<1>(row, weight, sums);
    const scalar_t* bias_of = static_cast<const scalar_t*>(call_.bias);
    for (int token = 0; token < Tokens; ++token) {
      scalar_t* out = static_cast<scalar_t*>(call_.out) + token * call_.rows + first;
      const Floats products = horizontal_sums<kFloats>(sums[token]);
      for (int64_t i = 0; i < rows; ++i) {
        const float scale = call_.scale ? call_.scale[first + i] : 1.0f;
        const float bias = bias_of ? static_cast<float>(bias_of[first + i]) : 0.0f;
        out[i] = scalar_t(products[i] * scale + bias);
      }
    }
  }

  // Multiplies `Rows` rows, from `first` on, with the inputs: sums[token][row] has the product as the sum of its lanes.
  template <int Rows, int Tokens>
  SINKATTN_INLINE void multiply_rows(int64_t first, const weight_t* weight, Floats (&sums)[Tokens][kFloats]) const {
    const int64_t columns = call_.columns;
    Floats acc[Rows][Tokens] = {};
    for (int64_t column = 0; column < columns; column += kFloats) {
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const weight_t* from = weight + (first + row) * columns + column;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes);
        const Floats w = column + kFloats <= columns ? load(from) : load_first(from, columns - column);
#pragma GCC unroll 4
        for (int token = 0; token < Tokens; ++token) {
          acc[row][token] = multiply_add(w, load(input_ + token * input_stride_ + column), acc[row][token]);
        }
      }
    }
    for (int row = 0; row < Rows; ++row) {
      for (int token = 0; token < Tokens; ++token) sums[token][first + row] = acc[row][token];
    }
  }

  const LinearCall& call_;
  Workers& workers_;
  const int64_t input_stride_;
  const float* input_ = nullptr;
  int64_t num_workers_ = 1;
};

template <typename scalar_t>
void linear_as(const LinearCall& call, Workers& workers) {
  if (call.has_int8_weight) return Linear<int8_t, scalar_t>(call, workers).run();
  Linear<scalar_t, scalar_t>(call, workers).run();
}

inline void linear(const LinearCall& call, Workers& workers) {
  switch (call.type) {
    case LinearType::kFloat: return linear_as<float>(call, workers);
    case LinearType::kHalf: return linear_as<Half>(call, workers);
    case LinearType::kBFloat16: return linear_as<BFloat16>(call, workers);
  }
}

}  // namespace SINKATTN_ISA
}  // namespace sinkattn

#if defined(__clang__) && (defined(SINKATTN_AVX512) || defined(SINKATTN_AVX2))
#pragma clang attribute pop
#endif
