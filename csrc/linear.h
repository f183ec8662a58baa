// Interface of the CPU kernel of linear layers, without torch: input * weight^T * scale + bias, for a decode step. One
// call multiplies an input with several matrices, such as those of queries, keys and values.
// linear.cpp (the operator) and tests/csrc call it; linear_kernel.h implements it, compiled once for each instruction
// set by linear_<set>.cpp.
#pragma once

#include <cstdint>

namespace sinkattn {

enum class LinearType { kFloat, kHalf, kBFloat16 };

constexpr int64_t kMaxLinearTokens = 4;

struct LinearMatrix {
  int64_t rows;
  const void* weight;  // [rows, columns], contiguous
  const float* scale;  // [rows] or null
  const void* bias;    // [rows] or null
};

// Arguments of one call. Sums are in fp32.
struct LinearCall {
  LinearType type;  // of input, bias and output, and of weights that are not int8
  bool has_int8_weights;
  int64_t columns, tokens;  // tokens: 1 to kMaxLinearTokens
  const LinearMatrix* matrices;
  int64_t num_matrices;
  const void* input;  // [tokens, columns], contiguous
  void* out;          // [tokens, rows of all matrices], contiguous
};

}  // namespace sinkattn
