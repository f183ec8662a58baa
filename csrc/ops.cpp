// Schemas of the `sinkattn::` operators. Kernels live beside the data they touch: ring_cache.cpp, ring_cache_cuda.cu.
// Shapes: keys, values [batch, kv_heads, slots, head_dim]; key, value [batch, kv_heads, tokens, head_dim];
// cos, sin [batch, tokens, pairs]; seen, peak, lengths, counts [batch] int64.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sinkattn, m) {
  m.def(
      "append_(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor seen, Tensor? lengths, "
      "Tensor? cos, Tensor? sin, int num_sinks, bool interleaved) -> ()");
  m.def("rollback_(Tensor(a!) seen, Tensor(b!) peak, Tensor counts, int headroom) -> ()");
  m.def("reorder_(Tensor(a!) keys, Tensor(b!) values, Tensor source) -> ()");
  m.def("reset_(Tensor(a!) keys, Tensor(b!) values, Tensor rows) -> ()");
  m.def("linearise(Tensor keys, Tensor values, Tensor seen, int num_sinks, int window) -> (Tensor, Tensor)");
}
