// The operator sinkattn::linear on the CPU: checks the arguments and calls the kernel (linear.h) on threads of torch.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "operators.h"
#include "require.h"
#include "torch_workers.h"

namespace sinkattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

LinearType linear_type(const Tensor& input) {
  switch (input.scalar_type()) {
    case ScalarType::Float: return LinearType::kFloat;
    case ScalarType::Half: return LinearType::kHalf;
    case ScalarType::BFloat16: return LinearType::kBFloat16;
    default: require(false, "input: expected dtype float32, float16 or bfloat16");
  }
  return {};
}

// Address of a tensor with one element per row of a matrix.
const void* per_row_data(const Tensor& tensor, int64_t rows, ScalarType type, const char* name) {
  require(
      tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == rows && tensor.scalar_type() == type &&
          tensor.is_contiguous(),
      name, ": expected [", rows, "], contiguous, in ", type == ScalarType::Float ? "float32" : "the dtype of input");
  return tensor.const_data_ptr();
}

Tensor linear(
    const Tensor& input, const std::vector<Tensor>& weights, const std::vector<Tensor>& scales,
    const std::vector<Tensor>& biases) {
  LinearCall call;
  call.type = linear_type(input);
  call.num_matrices = static_cast<int64_t>(weights.size());
  require(call.num_matrices > 0, "weights: expected at least one, got none");
  require(scales.empty() || scales.size() == weights.size(), "scales: expected none, or as many as weights");
  require(biases.empty() || biases.size() == weights.size(), "biases: expected none, or as many as weights");
  call.has_int8_weights = weights[0].scalar_type() == ScalarType::Char;
  std::vector<LinearMatrix> matrices;
  int64_t rows = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    require(
        weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous(),
        "weight: expected [rows, columns], contiguous, on the CPU");
    require(
        input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1) && weight.size(1) > 0,
        "input: expected [..., ", weight.size(1), "]");
    const ScalarType type = call.has_int8_weights ? ScalarType::Char : input.scalar_type();
    require(weight.scalar_type() == type, "weight: expected int8 or the dtype of input");
    LinearMatrix matrix{weight.size(0), weight.const_data_ptr(), nullptr, nullptr};
    if (!scales.empty()) {
      matrix.scale = static_cast<const float*>(per_row_data(scales[i], matrix.rows, ScalarType::Float, "scale"));
    }
    if (!biases.empty()) matrix.bias = per_row_data(biases[i], matrix.rows, input.scalar_type(), "bias");
    matrices.push_back(matrix);
    rows += matrix.rows;
  }
  call.matrices = matrices.data();
  call.columns = weights[0].size(1);
  call.tokens = input.numel() / call.columns;
  require(
      call.tokens >= 1 && call.tokens <= kMaxLinearTokens, "input: expected 1 to ", kMaxLinearTokens, " tokens, got ",
      call.tokens);
  const Tensor contiguous = input.is_contiguous() ? input : torch::stable::contiguous(input);
  call.input = contiguous.const_data_ptr();
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim + 1 < input.dim(); ++dim) shape.push_back(input.size(dim));
  shape.push_back(rows);
  Tensor out = torch::stable::new_empty(input, shape);
  call.out = out.mutable_data_ptr();
  TorchWorkers workers;
  instruction_set().linear(call, workers);
  return out;
}

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(SINKATTN_OPERATORS, CPU, m) { m.impl("linear", TORCH_BOX(&sinkattn::linear)); }
