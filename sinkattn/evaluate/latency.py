"""What a token costs: by the size of the window, against recomputation and dense attention, and along a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sinkattn.evaluate.methods import CacheSize, Dense, Method, Recomputed, Streamed, dense_limit
from sinkattn.evaluate.perplexity import time_in_turns


@dataclass(frozen=True)
class Cost:
    """What the next token costs a method that has seen so many."""

    method: str
    """``sinkattn``, ``dense`` or ``recomputed``."""
    size: int
    """Tokens that the next one sees."""
    seen: int
    """Tokens of the stream so far."""
    seconds: float
    """Median of all rounds."""
    kv_bytes: int | None
    """Keys and values kept; None where none are."""
    peak_bytes: int | None
    """Most memory allocated on the device during a token, beyond the weights and caches; None on a CPU."""


Watch = Callable[[int, int], None]
"""Called after every measurement: done, of how many."""


def by_window(model: PreTrainedModel, num_sinks: int, sizes: list[int], rounds: int, watch: Watch) -> list[Cost]:
    """Costs at several totals of sinks and window; dense attention over a cache of as many tokens.

    The three methods take their tokens in turns. Raises ValueError for sizes that the model cannot take.
    """
    costs = []
    for done, size in enumerate(sizes):
        if size <= num_sinks:
            raise ValueError(f"sizes: expected more than the {num_sinks} sinks, got {size}")
        methods = {"sinkattn": Streamed(model, CacheSize(num_sinks, size - num_sinks))}
        if (limit := dense_limit(methods["sinkattn"])) is None or size < limit:
            methods["dense"] = Dense(model)
        methods["recomputed"] = Recomputed(model, size, None)
        costs += _costs(methods, dict.fromkeys(methods, size), 0, size, rounds)
        watch(done + 1, len(sizes))
    return costs


def by_length(model: PreTrainedModel, cache: CacheSize, lengths: list[int], rounds: int, watch: Watch) -> list[Cost]:
    """Costs of sinks and a window, and of dense attention, after so many tokens of a stream, in ascending order.

    The tokens that are timed stay in the stream of the former: it has seen a few more.
    """
    streamed = Streamed(model, cache)
    methods: dict[str, Method] = {"sinkattn": streamed, "dense": Dense(model)}
    limit = dense_limit(streamed)
    costs, seen = [], 0
    for done, length in enumerate(lengths):
        if limit is not None and length >= limit:
            methods.pop("dense", None)
        sizes = {"sinkattn": min(length, cache.total), "dense": length}
        costs += _costs(methods, sizes, seen, length, rounds)
        seen = length
        watch(done + 1, len(lengths))
    return costs


def _costs(methods: dict[str, Method], sizes: dict[str, int], seen: int, length: int, rounds: int) -> list[Cost]:
    model = next(iter(methods.values())).model
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (length - seen,), generator=torch.Generator().manual_seed(0))
    for method in methods.values():
        method.feed(ids, ids, torch.zeros(len(ids), dtype=torch.bool))
    kept = [method.kv_bytes for method in methods.values()]
    seconds = time_in_turns([*methods.values()], 0, rounds)
    return [
        Cost(name, sizes[name], length, *each, _peak_bytes(method))
        for (name, method), *each in zip(methods.items(), seconds, kept, strict=True)
    ]


def _peak_bytes(method: Method) -> int | None:
    device = method.model.device
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    method.step(0)
    return torch.cuda.max_memory_allocated(device) - before
