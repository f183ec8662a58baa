"""Time and memory per token of sinkattn, dense attention and recomputation: by window size, and along a stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.perplexity import time_interleaved, timing_seconds
from sinkattn.evaluate.speed import Speed
from sinkattn.ring_cache import CacheDtype


@dataclass(frozen=True)
class Settings:
    """Sizes to run, all in tokens and ascending."""

    sizes: tuple[int, ...]
    """Totals of sinks and window."""
    lengths: tuple[int, ...]
    """Tokens of the stream, for the largest size."""
    rounds: int = 50
    """Tokens timed in each case."""
    max_seconds: float = math.inf
    """Fewer are timed after so long, but three at least."""
    cache_dtypes: tuple[CacheDtype, ...] = ()
    """Dtypes of 8 bits: caches also run in each of them."""

    def seconds(self, speed: Speed) -> float:
        """About how long `by_window` and `by_length` take."""
        num_cached = 2 + len(self.cache_dtypes)
        fed, step = num_cached * (sum(self.sizes) + self.lengths[-1]) * speed.token, num_cached * speed.step
        steps = [step + speed.forward(size) for size in self.sizes] + [step] * len(self.lengths)
        return fed + sum(timing_seconds(step, self.rounds, self.max_seconds) for step in steps)


@dataclass(frozen=True)
class Cost:
    """Time and memory of the next token, for one method and size."""

    method: str
    """``sinkattn``, the same with a dtype of 8 bits, ``dense`` or ``recomputed``."""
    size: int
    """Tokens that the next token sees."""
    seen: int
    """Tokens of the stream before it."""
    seconds: float
    """Median over all rounds."""
    rounds: int
    """Tokens that were timed."""
    kv_bytes: int | None
    """Bytes of keys and values kept; None for a method without a KV cache."""
    peak_bytes: int | None
    """Peak of the memory allocated on the GPU during a step, beyond weights and caches; None on a CPU."""


OnProgress = Callable[[int, int], None]
"""Called after each size or length, with the number done and their total number."""


def by_window(model: PreTrainedModel, num_sinks: int, settings: Settings, on_progress: OnProgress) -> list[Cost]:
    """Costs at several totals of sinks and window; dense attention has a cache of the same length.

    The steps of the three methods are interleaved. Raises ValueError for sizes that the model cannot take, and
    `Interrupted` if it is raised before the first is timed; later it only leaves out the rest.
    """
    costs: list[Cost] = []
    for done, size in enumerate(settings.sizes):
        if size <= num_sinks:
            raise ValueError(f"sizes: expected more than the {num_sinks} sinks, got {size}")
        cache = CacheSize(num_sinks, size - num_sinks)
        streamed = _streamed(model, cache, settings)
        methods: dict[str, Method] = {**streamed}
        if (limit := dense_limit(streamed["sinkattn"])) is None or size < limit:
            methods["dense"] = Dense(model)
        methods["recomputed"] = Recomputed(model, size, None)
        try:
            costs += _costs(methods, dict.fromkeys(methods, size), 0, size, settings)
        except Interrupted:
            if not costs:
                raise
            break
        on_progress(done + 1, len(settings.sizes))
    return costs


def by_length(model: PreTrainedModel, cache: CacheSize, settings: Settings, on_progress: OnProgress) -> list[Cost]:
    """Costs of sinkattn and of dense attention along a stream; none after `Interrupted` is raised in a forward.

    sinkattn keeps the tokens that are fed for timing, so it has seen slightly more than ``length`` tokens; dense
    attention takes them back.
    """
    streamed = _streamed(model, cache, settings)
    methods: dict[str, Method] = {**streamed, "dense": Dense(model)}
    limit = dense_limit(streamed["sinkattn"])
    costs: list[Cost] = []
    seen = 0
    for done, length in enumerate(settings.lengths):
        if limit is not None and length >= limit:
            methods.pop("dense", None)
        sizes = {**dict.fromkeys(streamed, min(length, cache.total)), "dense": length}
        try:
            costs += _costs(methods, sizes, seen, length, settings)
        except Interrupted:
            break
        seen = length
        on_progress(done + 1, len(settings.lengths))
    return costs


def _streamed(model: PreTrainedModel, cache: CacheSize, settings: Settings) -> dict[str, Streamed]:
    """sinkattn by name, in full precision first."""
    eight_bit = {f"sinkattn {x}": Streamed(model, cache, cache_dtype=x) for x in settings.cache_dtypes}
    return {"sinkattn": Streamed(model, cache), **eight_bit}


def _costs(methods: dict[str, Method], sizes: dict[str, int], seen: int, length: int, settings: Settings) -> list[Cost]:
    model = next(iter(methods.values())).model
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids = torch.randint(vocabulary, (length - seen,), generator=torch.Generator().manual_seed(0))
    for method in methods.values():
        method.feed(ids, ids, torch.zeros(len(ids), dtype=torch.bool))
    kept = [method.kv_bytes for method in methods.values()]
    timing = time_interleaved([*methods.values()], 0, settings.rounds, settings.max_seconds)
    return [
        Cost(name, sizes[name], length, each, timing.rounds, kv_bytes, _peak_bytes(method))
        for (name, method), each, kv_bytes in zip(methods.items(), timing.seconds, kept, strict=True)
    ]


def _peak_bytes(method: Method) -> int | None:
    device = method.model.device
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    method.step(0)
    return torch.cuda.max_memory_allocated(device) - before
