"""Attention with sinks over a ring-buffer KV cache: the operators of sinkattn as a kernel, without its models.

`RingKVCache` and `sink_attention` are the cache and the attention; `ops` has the operators on plain tensors, and
`reference` the specification in plain PyTorch.
"""

from . import ops, reference
from .ring_cache import RingKVCache, sink_attention
from .rope import Rope

RingLayout = ops.RingLayout

__all__ = ["RingKVCache", "RingLayout", "Rope", "ops", "reference", "sink_attention"]
