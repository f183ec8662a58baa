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

template <typename weight_t, typename scalar_t>
class Linear {
 public:
  Linear(const LinearCall& call, Workers& workers)
      : call_(call), workers_(workers), input_stride_(round_up(call.columns, kFloats)) {
    for (int64_t i = 0; i < call.num_matrices; ++i) {
      rows_ += call.matrices[i].rows;
      blocks_ += num_blocks(call.matrices[i]);
    }
  }

  void run() {
    if (rows_ == 0) return;
    convert_input();
    const int64_t bytes = rows_ * call_.columns * static_cast<int64_t>(sizeof(weight_t));
    num_workers_ = std::max<int64_t>(1, std::min(bytes / kMinWorkerWeightBytes, workers_.max_workers()));
    workers_.run(
        num_workers_, [](void* self, int64_t worker) { static_cast<const Linear*>(self)->work(worker); }, this);
  }

 private:
  static constexpr int64_t kRowsAtOnce = 4;
  static constexpr int64_t kLine = std::max<int64_t>(64 / sizeof(weight_t), kFloats);  // weights of a cache line

  // Blocks of kFloats rows; the last one of a matrix may have fewer.
  static int64_t num_blocks(const LinearMatrix& matrix) { return (matrix.rows + kFloats - 1) / kFloats; }

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

  // Each worker has a range of the blocks of all matrices.
  void work(int64_t worker) const {
    int64_t begin = blocks_ * worker / num_workers_, end = blocks_ * (worker + 1) / num_workers_;
    scalar_t* out = static_cast<scalar_t*>(call_.out);
    for (int64_t i = 0; i < call_.num_matrices; ++i) {
      const LinearMatrix& matrix = call_.matrices[i];
      const int64_t blocks = num_blocks(matrix);
      for (int64_t block = std::max<int64_t>(begin, 0); block < std::min(end, blocks); ++block) {
        switch (call_.tokens) {
          case 1: multiply_block<1>(matrix, block * kFloats, out); break;
          case 2: multiply_block<2>(matrix, block * kFloats, out); break;
          case 3: multiply_block<3>(matrix, block * kFloats, out); break;
          default: multiply_block<kMaxLinearTokens>(matrix, block * kFloats, out);
        }
      }
      begin -= blocks;
      end -= blocks;
      out += matrix.rows;
    }
  }

  // Rows of a matrix from `first` on; `out_rows` is where its rows of the first token begin in the output.
  template <int Tokens>
  void multiply_block(const LinearMatrix& matrix, int64_t first, scalar_t* out_rows) const {
    const int64_t rows = std::min(kFloats, matrix.rows - first);
    const weight_t* weight = static_cast<const weight_t*>(matrix.weight) + first * call_.columns;
    Floats sums[Tokens][kFloats] = {};
    int64_t row = 0;
    for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) multiply_rows<kRowsAtOnce>(row, weight, sums);
    for (; row < rows; ++row) multiply_rows<1>(row, weight, sums);
    const scalar_t* bias_of = static_cast<const scalar_t*>(matrix.bias);
    for (int token = 0; token < Tokens; ++token) {
      scalar_t* out = out_rows + token * rows_ + first;
      const Floats products = horizontal_sums<kFloats>(sums[token]);
      for (int64_t i = 0; i < rows; ++i) {
        const float scale = matrix.scale ? matrix.scale[first + i] : 1.0f;
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
    const weight_t* rows = weight + first * columns;
    int64_t column = 0;
    for (; column + kLine <= columns; column += kLine) {
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const weight_t* from = rows + row * columns + column;
        __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchBytes);
#pragma GCC unroll 8
        for (int64_t i = 0; i < kLine; i += kFloats) {
          const Floats w = load(from + i);
#pragma GCC unroll 4
          for (int token = 0; token < Tokens; ++token) {
            acc[row][token] = multiply_add(w, load(input_ + token * input_stride_ + column + i), acc[row][token]);
          }
        }
      }
    }
    for (; column < columns; column += kFloats) {
#pragma GCC unroll 4
      for (int row = 0; row < Rows; ++row) {
        const weight_t* from = rows + row * columns + column;
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
  int64_t rows_ = 0, blocks_ = 0;  // of all matrices
  int64_t num_workers_ = 1;
};

template <typename scalar_t>
void linear_as(const LinearCall& call, Workers& workers) {
  if (call.has_int8_weights) return Linear<int8_t, scalar_t>(call, workers).run();
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
