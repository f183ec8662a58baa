// Schemas of the `sinkattn::` operators. Kernels: ring_cache.cpp, ring_cache_cuda.cu, attention.cpp, and for attention
// on CUDA sinkattn/ops/attention.py.
// Shapes: keys, values [batch, kv_heads, slots, head_dim]; key, value [batch, kv_heads, tokens, head_dim];
// cos, sin [batch, tokens, pairs], for sink_attention_ [2, batch, tokens, pairs]; query and what it returns [batch,
// heads, tokens, head_dim]; sink_logits, alibi_slopes [heads]; seen, peak, lengths, counts [batch] int64; arrivals
// [batch, kv_heads] int32.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sinkattn, m) {
  m.def(
      "append_(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor seen, Tensor? lengths, "
      "Tensor? cos, Tensor? sin, int num_sinks, bool interleaved) -> ()");
  m.def("rollback_(Tensor(a!) seen, Tensor(b!) peak, Tensor counts, int headroom) -> ()");
  m.def("reorder_(Tensor(a!) keys, Tensor(b!) values, Tensor source) -> ()");
  m.def("reset_(Tensor(a!) keys, Tensor(b!) values, Tensor rows) -> ()");
  m.def("linearise(Tensor keys, Tensor values, Tensor seen, int num_sinks, int window) -> (Tensor, Tensor)");
  m.def(
      "sink_attention_(Tensor(a!) keys, Tensor(b!) values, Tensor query, Tensor key, Tensor value, Tensor seen, "
      "Tensor? lengths, Tensor? cos, Tensor? sin, int num_sinks, int window, float scale, bool interleaved, "
      "Tensor? sink_logits, float? softcap, Tensor? alibi_slopes, Tensor(c!)? arrivals) -> Tensor");
  m.def("cpu_capability() -> str");
}
