// The operator sinkattn::linear on the CPU: checks the arguments and calls the kernel (linear.h) on threads of torch.
#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

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

// Address of an optional tensor with one element per row of weights, or null.
const void* per_row_data(const std::optional<Tensor>& option, const Tensor& weight, ScalarType type, const char* name) {
  if (!option) return nullptr;
  require(
      option->is_cpu() && option->dim() == 1 && option->size(0) == weight.size(0) && option->scalar_type() == type &&
          option->is_contiguous(),
      name, ": expected [", weight.size(0), "], contiguous, in ",
      type == ScalarType::Float ? "float32" : "the dtype of input");
  return option->const_data_ptr();
}

Tensor linear(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  require(
      weight.dim() == 2 && weight.is_cpu() && weight.is_contiguous(),
      "weight: expected [rows, columns], contiguous, on the CPU");
  require(
      input.dim() >= 1 && input.size(input.dim() - 1) == weight.size(1) && weight.size(1) > 0,
      "input: expected [..., ", weight.size(1), "]");
  LinearCall call;
  call.type = linear_type(input);
  call.has_int8_weight = weight.scalar_type() == ScalarType::Char;
  require(
      call.has_int8_weight || weight.scalar_type() == input.scalar_type(),
      "weight: expected int8 or the dtype of input");
  call.rows = weight.size(0);
  call.columns = weight.size(1);
  call.tokens = input.numel() / call.columns;
  require(
      call.tokens >= 1 && call.tokens <= kMaxLinearTokens, "input: expected 1 to ", kMaxLinearTokens, " tokens, got ",
      call.tokens);
  call.weight = weight.const_data_ptr();
  call.scale = static_cast<const float*>(per_row_data(scale, weight, ScalarType::Float, "scale"));
  call.bias = per_row_data(bias, weight, input.scalar_type(), "bias");
  const Tensor contiguous = torch::stable::contiguous(input);
  call.input = contiguous.const_data_ptr();
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim + 1 < input.dim(); ++dim) shape.push_back(input.size(dim));
  shape.push_back(call.rows);
  Tensor out = torch::stable::new_empty(input, shape);
  call.out = out.mutable_data_ptr();
  TorchWorkers workers;
  if (call.rows > 0) instruction_set().linear(call, workers);
  return out;
}

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CPU, m) { m.impl("linear", TORCH_BOX(&sinkattn::linear)); }
