"""Endless streams for transformers models: a ring-buffer KV cache with attention sinks.

`enable` makes a loaded transformers model stream. `RingKVCache` and `sink_attention` are the cache and the attention
without transformers. Each name is imported on first use, and with it what it needs: torch, and transformers only for
names such as `enable` or `SinkCache`. So the command line answers ``--help`` at once. ``import sinkattn.ops`` registers
the operators ``torch.ops.sinkattn``.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "BackgroundLearner",
    "DraftModel",
    "OnlineLearner",
    "PoolFullError",
    "PromptLookup",
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
    from sinkattn import evaluate as evaluate
    from sinkattn import hf as hf
    from sinkattn import ops as ops
    from sinkattn import reference
    from sinkattn.hf import (
        BackgroundLearner,
        DraftModel,
        OnlineLearner,
        PoolFullError,
        PromptLookup,
        SamplingParams,
        SinkCache,
        Stream,
        StreamPool,
        UnsupportedModelError,
        disable,
        enable,
        load_stream,
    )
    from sinkattn.ops import RingLayout, build_info
    from sinkattn.ring_cache import RingKVCache, sink_attention
    from sinkattn.rope import Rope
else:
    from importlib import import_module

    _SUBMODULES = ("evaluate", "hf", "ops", "reference")
    # Where the names are that need no transformers; the others are in `hf`.
    _MODULES = {
        "RingKVCache": "ring_cache",
        "RingLayout": "ops",
        "Rope": "rope",
        "build_info": "ops",
        "sink_attention": "ring_cache",
    }

    # Type checkers must not see this function: they would accept any name.
    def __getattr__(name: str) -> object:
        if name in _SUBMODULES:
            return import_module(f"sinkattn.{name}")
        if name not in __all__:
            raise AttributeError(f"module 'sinkattn' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"sinkattn.{_MODULES.get(name, 'hf')}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_SUBMODULES})
