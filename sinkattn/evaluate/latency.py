"""Time and memory per token of sinkattn, dense attention and recomputation: by window size, and along a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from sinkattn.evaluate.methods import CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.perplexity import time_interleaved


@dataclass(frozen=True)
class Cost:
    """Time and memory of the next token, for one method and size."""

    method: str
    """``sinkattn``, ``dense`` or ``recomputed``."""
    size: int
    """Tokens that the next token sees."""
    seen: int
    """Tokens of the stream before it."""
    seconds: float
    """Median over all rounds."""
    kv_bytes: int | None
    """Bytes of keys and values kept; None for a method without a KV cache."""
    peak_bytes: int | None
    """Peak of the memory allocated on the GPU during a step, beyond weights and caches; None on a CPU."""


OnProgress = Callable[[int, int], None]
"""Called after each size or length, with the number done and their total number."""


def by_window(
    model: PreTrainedModel, num_sinks: int, sizes: list[int], rounds: int, on_progress: OnProgress
) -> list[Cost]:
    """Costs at several totals of sinks and window; dense attention has a cache of the same length.

    The steps of the three methods are interleaved. Raises ValueError for sizes that the model cannot take.
    """
    costs: list[Cost] = []
    for done, size in enumerate(sizes):
        if size <= num_sinks:
            raise ValueError(f"sizes: expected more than the {num_sinks} sinks, got {size}")
        streamed = Streamed(model, CacheSize(num_sinks, size - num_sinks))
        methods: dict[str, Method] = {"sinkattn": streamed}
        if (limit := dense_limit(streamed)) is None or size < limit:
            methods["dense"] = Dense(model)
        methods["recomputed"] = Recomputed(model, size, None)
        costs += _costs(methods, dict.fromkeys(methods, size), 0, size, rounds)
        on_progress(done + 1, len(sizes))
    return costs


def by_length(
    model: PreTrainedModel, cache: CacheSize, lengths: list[int], rounds: int, on_progress: OnProgress
) -> list[Cost]:
    """Costs of sinkattn and of dense attention after ``lengths`` tokens of a stream, which must be ascending.

    sinkattn keeps the tokens that are fed for timing, so it has seen slightly more than ``length`` tokens; dense
    attention takes them back.
    """
    streamed = Streamed(model, cache)
    methods: dict[str, Method] = {"sinkattn": streamed, "dense": Dense(model)}
    limit = dense_limit(streamed)
    costs: list[Cost] = []
    seen = 0
    for done, length in enumerate(lengths):
        if limit is not None and length >= limit:
            methods.pop("dense", None)
        sizes = {"sinkattn": min(length, cache.total), "dense": length}
        costs += _costs(methods, sizes, seen, length, rounds)
        seen = length
        on_progress(done + 1, len(lengths))
    return costs


def _costs(methods: dict[str, Method], sizes: dict[str, int], seen: int, length: int, rounds: int) -> list[Cost]:
    model = next(iter(methods.values())).model
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids = torch.randint(vocabulary, (length - seen,), generator=torch.Generator().manual_seed(0))
    for method in methods.values():
        method.feed(ids, ids, torch.zeros(len(ids), dtype=torch.bool))
    kept = [method.kv_bytes for method in methods.values()]
    seconds = time_interleaved([*methods.values()], 0, rounds)
    return [
        Cost(name, sizes[name], length, each, kv_bytes, _peak_bytes(method))
        for (name, method), each, kv_bytes in zip(methods.items(), seconds, kept, strict=True)
    ]


def _peak_bytes(method: Method) -> int | None:
    device = method.model.device
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    method.step(0)
    return torch.cuda.max_memory_allocated(device) - before
