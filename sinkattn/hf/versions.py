"""Differences between the supported versions of transformers. No other file checks the version.

5.24 renamed the argument ``past_key_values`` to ``cache`` in forwards, `generate`, outputs and mask functions. Its own
models take the old name with a warning until 5.40; models with custom code may use either name.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import transformers
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

OLDEST_TESTED, NEWEST_TESTED = "5.17.0", "5.24.0"

CACHE_NAMES = ("cache", "past_key_values")


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


CHUNKS_HOLD_THE_PAST = _major_minor(transformers.__version__) < (5, 23)
"""Whether `generate` with ``prefill_chunk_size`` feeds all ids it is given, also those that the cache has seen."""


def cache_name(names: Collection[str]) -> str | None:
    """Name of the cache among ``names`` of arguments or output fields; None without a cache."""
    return next((name for name in CACHE_NAMES if name in names), None)


GENERATE_CACHE = cache_name(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters) or "cache"
"""Name of the cache among the arguments of `generate`."""


def forward_cache(model: nn.Module) -> str:
    """Name of the cache among the arguments of a model's forward."""
    return cache_name(inspect.signature(model.forward).parameters) or GENERATE_CACHE


def has_cache(kwargs: dict[str, Any]) -> bool:
    """Whether a cache is among the arguments of a call."""
    return any(kwargs.get(name) is not None for name in CACHE_NAMES)


def take_cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Remove the cache from the arguments of a call. Returns its name there, and the cache.

    Raises:
        ValueError: if a cache is given under both names.
    """
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    caches = {name: cache for name, cache in given.items() if cache is not None}
    if len(caches) > 1:
        raise ValueError("cache: is given twice, as past_key_values too; both name the same argument, pass one")
    return next(iter((caches or given).items()), (GENERATE_CACHE, None))


def native_layers(config: PreTrainedConfig) -> list[Any]:
    """Layers of the cache that transformers creates for a model, one for each of its layers."""
    layers = DynamicCache(config=config).layers
    # Until 5.22 the last layers were missing if they use the keys of other layers.
    return layers + [DynamicLayer() for _ in range(config.num_hidden_layers - len(layers))]


def untested_version_note() -> str:
    """Note for an error message if the installed transformers is newer than those tested; else empty."""
    if _major_minor(transformers.__version__) <= _major_minor(NEWEST_TESTED):
        return ""
    return (
        f" (transformers {transformers.__version__} is installed; this sinkattn was tested with {OLDEST_TESTED} to "
        f"{NEWEST_TESTED})"
    )
