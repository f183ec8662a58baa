"""Measure, on a short text, what `sinkattn.hf.swap.key_factors` needs to know of the keys and queries of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.dry_run import sample_ids
from sinkattn.hf.ranks import wait_for_ranks
from sinkattn.hf.swap.key_factors import key_factors
from sinkattn.hf.swap.ring_patch import RingPatch

NUM_TOKENS = 64
NUM_SKIPPED = 4
"""The first tokens, whose keys are unlike the others; they are sinks in a stream, too."""


class _Measured(RingPatch):
    """A `RingPatch` with rings of full precision that computes the factors of each layer from its first call."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any
    ) -> Tensor:
        """See `RingPatch.attend`."""
        num_missing = key.shape[2] - query.shape[2]  # some models drop queries whose outputs are not needed
        some = slice(max(0, NUM_SKIPPED - num_missing), None)
        factors = key_factors(query[:, :, some], key[:, :, NUM_SKIPPED:], self.groups[module].rotation)
        if factors is not None:
            self.key_factors[module] = factors
        return super().attend(module, query, key, value, scale, **options)


@torch.no_grad()
def measure_key_factors(patch: RingPatch) -> dict[nn.Module, Tensor]:
    """`key_factors` of each layer that needs any, for a patch that is not installed yet."""
    measured = _Measured(patch.model, patch.layout, patch.backend, patch.probe_result)
    try:
        measured.install()
        wait_for_ranks(patch.model)
        options: dict[str, Any] = {measured.cache_argument: SinkCache(patch.model), "use_cache": True}
        measured.decoder(input_ids=sample_ids(patch.model, NUM_TOKENS), **options)
    finally:
        measured.remove()
    return measured.key_factors
