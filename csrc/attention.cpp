// The operator sinkattn::sink_attention_ on the CPU: checks the arguments and calls the kernel (attention.h) on threads
// of torch.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

#include "argument_checks.h"
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

CacheType cache_type(const Tensor& keys) {
  switch (keys.scalar_type()) {
    case ScalarType::Float: return CacheType::kFloat;
    case ScalarType::Double: return CacheType::kDouble;
    case ScalarType::Half: return CacheType::kHalf;
    case ScalarType::BFloat16: return CacheType::kBFloat16;
    default: require(false, "keys, values: expected dtype float32, float64, float16 or bfloat16");
  }
  return {};
}

Tensor sink_attention_(
    const Tensor& keys, const Tensor& values, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& seen, const std::optional<Tensor>& lengths, const std::optional<Tensor>& cos,
    const std::optional<Tensor>& sin, int64_t num_sinks, int64_t window, double scale, bool interleaved,
    const std::optional<Tensor>& sink_logits, std::optional<double> softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& /* arrivals: used only on GPUs */) {
  check_new_tokens(keys, values, key, value, num_sinks);
  check_layout(keys, values, num_sinks, window);
  check_query(query, key, keys);
  require(values.size(3) > 0, "values: expected a head_dim of 1 or more, got 0");
  check_tables(cos, sin, key, keys, 1);
  const int64_t tokens = query.size(2);
  AttentionCall call;
  call.type = cache_type(keys);
  call.layout = RingLayout{num_sinks, window, keys.size(2) - num_sinks - window};
  call.batch = keys.size(0);
  call.heads = query.size(1);
  call.kv_heads = keys.size(1);
  call.tokens = tokens;
  call.head_dim = keys.size(3);
  call.value_dim = values.size(3);
  call.keys = keys.mutable_data_ptr();
  call.values = values.mutable_data_ptr();
  call.query = view_of(query);
  call.key = view_of(key);
  call.value = view_of(value);
  call.seen = int64_data(seen, call.batch, keys, "seen");
  call.lengths = lengths ? int64_data(*lengths, call.batch, keys, "lengths") : nullptr;
  check_seen_and_lengths(call.seen, call.lengths, call.batch, tokens);
  call.pairs = cos ? cos->size(3) : 0;
  if (cos) call.cos = view_of(*cos);
  if (sin) call.sin = view_of(*sin);
  call.interleaved = interleaved;
  call.scale = scale;
  call.softcap = softcap.value_or(0);
  call.sink_logits = per_head_data(sink_logits, query, keys, "sink_logits");
  call.alibi_slopes = per_head_data(alibi_slopes, query, keys, "alibi_slopes");
  // [batch, tokens, heads, value_dim] in memory, so that models can merge the heads without a copy.
  Tensor out = torch::stable::new_empty(query, {call.batch, tokens, call.heads, call.value_dim});
  call.out = out.mutable_data_ptr();
  if (call.batch > 0 && tokens > 0) {
    TorchWorkers workers;
    instruction_set().attend(call, workers);
  }
  return torch::stable::transpose(out, 1, 2);
}

std::string cpu_capability() { return instruction_set().name; }

}  // namespace
}  // namespace sinkattn

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CPU, m) { m.impl("sink_attention_", TORCH_BOX(&sinkattn::sink_attention_)); }

STABLE_TORCH_LIBRARY_IMPL(sinkattn, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&sinkattn::cpu_capability));
}
