// Schemas of the `sinkattn::` operators. Implementations: ring_cache.cpp (CPU) and ring_cache_cuda.cu for the ring,
// attention.cpp (CPU) and sinkattn/ops/attention.py (CUDA, Triton) for attention, linear.cpp (CPU) for linear layers.
//
// Shapes:
//   keys, values               [batch, kv_heads, slots, head_dim]; with `rows`, of any number of rows
//     of int8 or float8_e4m3fn they have no slots for sinks, which are then in
//   sink_keys, sink_values     [batch, kv_heads, num_sinks, head_dim]; and elements of 8 bits are multiplied by
//   key_scales, value_scales   [batch, kv_heads, slots, 1] float32
//   key, value                 [batch, kv_heads, tokens, head_dim]
//   query, attention output    [batch, heads, tokens, head_dim]
//   cos, sin                   [batch, tokens, pairs], for sink_attention_ [2, batch, tokens, pairs]
//   seen, peak, lengths,
//     counts, source           [batch] int64
//   rows of append_ and sink_attention_, row_sinks,
//     begins                   [batch] int64
//   rows of reset_             [any number] int64
//   sink_logits, alibi_slopes  [heads]
//   keys, values of sink_attention_gradients  [batch, kv_heads, num_sinks + window, head_dim], what linearise returned
//     before the call, or no tokens; out, gradient: of the call's output; returns the gradients of query, key, value
//     and sink_logits (empty without them)
//   input of linear            [..., columns], 1 to 4 tokens; each weight [rows, columns], scale and bias [rows];
//     output [..., rows of all weights], one weight after the other
//   arrivals                   [batch, kv_heads] int32, completion counters of KV splits on GPUs, zero between calls
#include <torch/csrc/stable/library.h>

#include "operators.h"

// Torch's macro takes the namespace as it is written.
#define DEFINE_OPERATORS(operators, m) STABLE_TORCH_LIBRARY(operators, m)

DEFINE_OPERATORS(SINKATTN_OPERATORS, m) {
  m.def(
      "append_(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor seen, Tensor? lengths, "
      "Tensor? cos, Tensor? sin, int num_sinks, bool interleaved, Tensor? rows, Tensor? row_sinks, "
      "Tensor(c!)? sink_keys=None, Tensor(d!)? sink_values=None, Tensor(e!)? key_scales=None, "
      "Tensor(f!)? value_scales=None) -> ()");
  m.def("rollback_(Tensor(a!) seen, Tensor(b!) peak, Tensor counts, int headroom) -> ()");
  m.def("reorder_(Tensor(a!) keys, Tensor(b!) values, Tensor source) -> ()");
  m.def("reset_(Tensor(a!) keys, Tensor(b!) values, Tensor rows) -> ()");
  m.def("linearise(Tensor keys, Tensor values, Tensor seen, int num_sinks, int window) -> (Tensor, Tensor)");
  m.def(
      "sink_attention_(Tensor(a!) keys, Tensor(b!) values, Tensor query, Tensor key, Tensor value, Tensor seen, "
      "Tensor? lengths, Tensor? cos, Tensor? sin, int num_sinks, int window, float scale, bool interleaved, "
      "Tensor? sink_logits, float? softcap, Tensor? alibi_slopes, Tensor(c!)? arrivals, Tensor? rows, "
      "Tensor? row_sinks, Tensor? begins, Tensor(d!)? sink_keys=None, Tensor(e!)? sink_values=None, "
      "Tensor(f!)? key_scales=None, Tensor(g!)? value_scales=None) -> Tensor");
  m.def(
      "sink_attention_gradients(Tensor keys, Tensor values, Tensor query, Tensor key, Tensor value, Tensor out, "
      "Tensor gradient, Tensor seen, Tensor? lengths, Tensor? cos, Tensor? sin, int num_sinks, int window, "
      "float scale, bool interleaved, Tensor? sink_logits, float? softcap, Tensor? alibi_slopes) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear(Tensor input, Tensor[] weights, Tensor[] scales, Tensor[] biases) -> Tensor");
  m.def("cpu_capability() -> str");
}
