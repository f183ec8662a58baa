"""What differs between the versions of transformers that are supported. Nothing outside this file asks for a version.

5.24 renamed the argument ``past_key_values`` to ``cache``: in forwards, `generate`, outputs and mask functions. Its own
models take the old name with a warning until 5.40; models whose code comes from elsewhere may have either name.
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


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


CHUNKS_HOLD_THE_PAST = _number(transformers.__version__) < (5, 23)
"""`generate` with ``prefill_chunk_size`` feeds all ids that it is given, those that the cache has seen, too."""


def cache_name(names: Collection[str]) -> str | None:
    """Which of ``names``, those of arguments or of fields of an output, is the cache's; None if none is."""
    return next((name for name in CACHE_NAMES if name in names), None)


GENERATE_CACHE: str = cache_name(inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters)
"""Name of the cache among the arguments of `generate`."""


def forward_cache(model: nn.Module) -> str:
    """Name of the cache among the arguments of a model's forward."""
    return cache_name(inspect.signature(model.forward).parameters) or GENERATE_CACHE


def take_cache(kwargs: dict[str, Any]) -> tuple[str, Any]:
    """Take the cache out of the arguments of a call, under the name that it has there.

    Raises:
        ValueError: it is there under both names.
    """
    given = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
    caches = {name: cache for name, cache in given.items() if cache is not None}
    if len(caches) > 1:
        raise ValueError("cache: is given twice, as past_key_values too; they are two names of one argument")
    return next(iter((caches or given).items()), (GENERATE_CACHE, None))


def native_layers(config: PreTrainedConfig) -> list[Any]:
    """Layers of the cache that transformers makes by itself, one for each layer of the model."""
    layers = DynamicCache(config=config).layers
    # Until 5.22 the last ones were left out if they take their keys from others.
    return layers + [DynamicLayer() for _ in range(config.num_hidden_layers - len(layers))]


def untested() -> str:
    """What a refusal adds if this version of transformers is newer than those tested; else nothing."""
    if _number(transformers.__version__) <= _number(NEWEST_TESTED):
        return ""
    return (
        f" (transformers {transformers.__version__} is installed; this sinkattn was tested with {OLDEST_TESTED} to "
        f"{NEWEST_TESTED})"
    )
