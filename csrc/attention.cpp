// The operators sinkattn::sink_attention_ and sinkattn::sink_attention_gradients on the CPU: check the arguments and
// call the kernel (attention.h) on threads of torch.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "argument_checks.h"
#include "operators.h"
#include "require.h"
#include "torch_workers.h"

namespace sinkattn {
namespace {

StridedView view_of(const Tensor& tensor) {
  StridedView out;
  out.data = tensor.const_data_ptr();
  for (int64_t dim = 0; dim < 4; ++dim) out.stride[dim] = tensor.stride(dim);
  return out;
}

CacheType cache_type(const Tensor& key) {
  switch (key.scalar_type()) {
    case ScalarType::Float: return CacheType::kFloat;
    case ScalarType::Double: return CacheType::kDouble;
    case ScalarType::Half: return CacheType::kHalf;
    case ScalarType::BFloat16: return CacheType::kBFloat16;
    default: require(false, "key, value: expected dtype float32, float64, float16 or bfloat16");
  }
  return {};
}

void check_begins(const int64_t* begins, const int64_t* seen, int64_t batch) {
  for (int64_t row = 0; begins && row < batch; ++row) {
    require(
        begins[row] >= 0 && begins[row] <= seen[row], "begins: expected 0 to the tokens seen, ", seen[row], ", got ",
        begins[row], " in row ", row);
  }
}

// What the two operators share, without memory of keys, values and output; after checks of sizes.
AttentionCall make_call(
    const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& seen, const std::optional<Tensor>& lengths, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, double scale, bool interleaved, const std::optional<Tensor>& sink_logits,
    std::optional<double> softcap, const std::optional<Tensor>& alibi_slopes) {
  check_query(query, key, keys);
  require(values.size(3) > 0, "values: expected a head_dim of 1 or more, got 0");
  check_tables(cos, sin, key, keys, 1);
  AttentionCall call{};
  call.type = cache_type(key);
  call.batch = key.size(0);
  call.heads = query.size(1);
  call.kv_heads = keys.size(1);
  call.tokens = query.size(2);
  call.head_dim = keys.size(3);
  call.value_dim = values.size(3);
  call.query = view_of(query);
  call.key = view_of(key);
  call.value = view_of(value);
  call.seen = int64_data(seen, call.batch, keys, "seen");
  call.lengths = lengths ? int64_data(*lengths, call.batch, keys, "lengths") : nullptr;
  check_seen_and_lengths(call.seen, call.lengths, call.batch, call.tokens);
  call.pairs = cos ? cos->size(3) : 0;
  if (cos) call.cos = view_of(*cos);
  if (sin) call.sin = view_of(*sin);
  call.interleaved = interleaved;
  call.scale = scale;
  call.softcap = softcap.value_or(0);
  call.sink_logits = per_head_data(sink_logits, query, keys, "sink_logits");
  call.alibi_slopes = per_head_data(alibi_slopes, query, keys, "alibi_slopes");
  return call;
}

Tensor sink_attention_(
    const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& seen, const std::optional<Tensor>& lengths, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, int64_t num_sinks, int64_t window, double scale, bool interleaved,
    const std::optional<Tensor>& sink_logits, std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& /* arrivals: used only on GPUs */,
    const std::optional<Tensor>& rows, const std::optional<Tensor>& row_sinks, const std::optional<Tensor>& begins,
    const std::optional<Tensor>& sink_keys, const std::optional<Tensor>& sink_values,
    const std::optional<Tensor>& key_scales, const std::optional<Tensor>& value_scales) {
  const EightBit more{sink_keys, sink_values, key_scales, value_scales};
  const bool is_eight_bit = check_new_tokens(keys, values, key, value, num_sinks, more);
  const int64_t slots = keys.size(2) + (is_eight_bit ? num_sinks : 0);
  check_layout(slots, num_sinks, window);
  AttentionCall call = make_call(
      keys, values, query, key, value, seen, lengths, cos, sin, scale, interleaved, sink_logits, softcap, alibi_slopes);
  call.layout = RingLayout{num_sinks, window, slots - num_sinks - window};
  const RowOptions options = row_options(rows, row_sinks, call.batch, keys);
  check_row_options(options, call.batch, keys.size(0), num_sinks);
  call.rows = options.rows;
  call.row_sinks = options.row_sinks;
  call.begins = begins ? int64_data(*begins, call.batch, keys, "begins") : nullptr;
  check_begins(call.begins, call.seen, call.batch);
  call.keys = keys.mutable_data_ptr();
  call.values = values.mutable_data_ptr();
  if (is_eight_bit) {
    call.ring = keys.scalar_type() == ScalarType::Char ? RingType::kInt8 : RingType::kFloat8;
    call.sink_keys = sink_keys->mutable_data_ptr();
    call.sink_values = sink_values->mutable_data_ptr();
    call.key_scales = static_cast<float*>(key_scales->mutable_data_ptr());
    call.value_scales = static_cast<float*>(value_scales->mutable_data_ptr());
  }
  // [batch, tokens, heads, value_dim] in memory, so that models can merge the heads without a copy.
  Tensor out = torch::stable::new_empty(query, {call.batch, call.tokens, call.heads, call.value_dim});
  call.out = out.mutable_data_ptr();
  if (call.batch > 0 && call.tokens > 0) {
    TorchWorkers workers;
    instruction_set().attend(call, workers);
  }
  return torch::stable::transpose(out, 1, 2);
}

// As many parts as keep many cores busy, but no more than 64 tokens each have, or 64 MiB hold. Of sizes alone, so that
// gradients do not depend on the number of threads.
int64_t num_gradient_groups(const AttentionCall& call) {
  constexpr int64_t kItems = 32, kMinTokens = 64, kMaxBytes = int64_t{64} << 20;
  const int64_t rows = std::max<int64_t>(1, call.batch * call.kv_heads);
  const int64_t bytes = 4 * rows * call.tokens * (call.head_dim + call.value_dim);
  const int64_t most = std::min((call.tokens + kMinTokens - 1) / kMinTokens, kMaxBytes / std::max<int64_t>(bytes, 1));
  return std::max<int64_t>(1, std::min((kItems + rows - 1) / rows, most));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sink_attention_gradients(
    const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& out, const Tensor& gradient, const Tensor& seen, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, int64_t num_sinks, int64_t window, double scale,
    bool interleaved, const std::optional<Tensor>& sink_logits, std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes) {
  check_new_tokens(keys, values, key, value, keys.scalar_type());
  require(key.size(0) == keys.size(0), "key: expected the batch of keys (", keys.size(0), "), got ", key.size(0));
  require(
      num_sinks >= 0 && num_sinks <= kMaxTokens && window >= 1 && window <= kMaxTokens,
      "num_sinks, window: expected 0 to 2^61 and 1 to 2^61");
  const int64_t past = keys.size(2);
  require(
      past == 0 || past == num_sinks + window, "keys, values: expected num_sinks + window (", num_sinks + window,
      ") tokens or none, got ", past);
  AttentionGradients call{};
  AttentionCall& forward = call.forward = make_call(
      keys, values, query, key, value, seen, lengths, cos, sin, scale, interleaved, sink_logits, softcap, alibi_slopes);
  for (int64_t row = 0; row < forward.batch; ++row) {
    require(past > 0 || forward.seen[row] == 0, "seen: expected 0 without past tokens, got ", forward.seen[row]);
  }
  for (const Tensor* tensor : {&out, &gradient}) {
    check_device(*tensor, keys, "out, gradient");
    require(
        tensor->dim() == 4 && tensor->scalar_type() == keys.scalar_type() && tensor->size(0) == forward.batch &&
            tensor->size(1) == forward.heads && tensor->size(2) == forward.tokens &&
            tensor->size(3) == forward.value_dim,
        "out, gradient: expected [batch, heads, tokens, value_dim] of query and values, in their dtype");
  }
  forward.layout = RingLayout{num_sinks, window, 0};
  forward.keys = const_cast<void*>(keys.const_data_ptr());  // only read
  forward.values = const_cast<void*>(values.const_data_ptr());
  call.past = past;
  call.out = view_of(out);
  call.gradient = view_of(gradient);
  call.groups = num_gradient_groups(forward);
  const int64_t batch = forward.batch, kv_heads = forward.kv_heads, tokens = forward.tokens;
  Tensor dquery = torch::stable::new_empty(query, {batch, tokens, forward.heads, forward.head_dim});
  Tensor dkey = torch::stable::new_empty(key, {batch, tokens, kv_heads, forward.head_dim});
  Tensor dvalue = torch::stable::new_empty(value, {batch, tokens, kv_heads, forward.value_dim});
  Tensor dlogits = torch::stable::new_zeros(query, {sink_logits ? forward.heads : 0}, acc_dtype(keys));
  Tensor new_keys = torch::stable::new_empty(key, {batch, kv_heads, tokens, forward.head_dim});
  Tensor new_values = torch::stable::new_empty(value, {batch, kv_heads, tokens, forward.value_dim});
  const int64_t width = call.padded(forward.head_dim) + call.padded(forward.value_dim);
  Tensor sums = torch::stable::new_empty(
      query, {batch, kv_heads, call.groups, call.sum_rows(), width}, acc_dtype(keys));
  call.dquery = dquery.mutable_data_ptr();
  call.dkey = dkey.mutable_data_ptr();
  call.dvalue = dvalue.mutable_data_ptr();
  call.dsink_logits = sink_logits ? dlogits.mutable_data_ptr() : nullptr;
  call.new_keys = new_keys.mutable_data_ptr();
  call.new_values = new_values.mutable_data_ptr();
  call.sums = sums.mutable_data_ptr();
  if (batch > 0 && tokens > 0) {
    TorchWorkers workers;
    instruction_set().differentiate(call, workers);
  }
  return {
      torch::stable::transpose(dquery, 1, 2), torch::stable::transpose(dkey, 1, 2),
      torch::stable::transpose(dvalue, 1, 2), dlogits};
}

std::string cpu_capability() { return instruction_set().name; }

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(SINKATTN_OPERATORS, CPU, m) {
  m.impl("sink_attention_", TORCH_BOX(&sinkattn::sink_attention_));
  m.impl("sink_attention_gradients", TORCH_BOX(&sinkattn::sink_attention_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(SINKATTN_OPERATORS, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&sinkattn::cpu_capability));
}
