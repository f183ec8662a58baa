"""Endless streams for transformers models: a ring-buffer KV cache with attention sinks.

`enable` makes a loaded transformers model stream. `RingKVCache` and `sink_attention` are the cache and the attention
without transformers, which is imported only on first use of a name that needs it, such as `enable` or `SinkCache`.
"""

from typing import TYPE_CHECKING

from sinkattn import reference
from sinkattn.ops import RingLayout, build_info
from sinkattn.ring_cache import RingKVCache, sink_attention
from sinkattn.rope import Rope

__version__ = "0.1.0"

__all__ = [
    "BackgroundLearner",
    "OnlineLearner",
    "PoolFullError",
    "RingKVCache",
    "RingLayout",
    "Rope",
    "SamplingParams",
    "SinkCache",
    "Stream",
    "StreamPool",
    "UnsupportedModelError",
    "build_info",
    "disable",
    "enable",
    "load_stream",
    "reference",
    "sink_attention",
]

if TYPE_CHECKING:
    from sinkattn.hf import (
        BackgroundLearner,
        OnlineLearner,
        PoolFullError,
        SamplingParams,
        SinkCache,
        Stream,
        StreamPool,
        UnsupportedModelError,
        disable,
        enable,
        load_stream,
    )
else:
    # Type checkers must not see this function: they would accept any name.
    def __getattr__(name: str) -> object:
        if name in __all__:
            from sinkattn import hf

            return getattr(hf, name)
        raise AttributeError(f"module 'sinkattn' has no attribute {name!r}")
