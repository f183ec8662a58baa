"""What one row holds in the rings of a cache, by layer and name: read, written, and with another number of sinks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from sinkattn.hf.cache.layers import SinkLayer

RowTensors = dict[str, Tensor]
"""A row of each of `SinkLayer.tensors`, of one layer."""


def row_tensors(layers: Iterable[SinkLayer], row: int) -> list[RowTensors]:
    """What a row holds in each layer that has memory; not copied."""
    return [{name: x[row] for name, x in layer.tensors.items()} for layer in layers if layer.ring is not None]


def write_row(layer: SinkLayer, row: int, tensors: RowTensors, device: torch.device) -> None:
    """Write what a row holds into a layer, whose ring is allocated on this device if there is none."""
    if layer.ring is None:
        like = (tensors.get(f"sink_{name}", tensors[name]) for name in ("keys", "values"))
        layer.lazy_initialization(*(x.unsqueeze(0).to(device) for x in like))
    assert layer.ring is not None
    for name, x in layer.ring.tensors.items():
        x[row].copy_(tensors[name])
    layer.set_factors(row, tensors.get("key_factors"))


def clear_row(layer: SinkLayer, row: int) -> None:
    """Let nothing of a row stay in a layer, for a new stream."""
    if layer.ring is not None:
        for x in layer.ring.tensors.values():
            x[row].zero_()
        layer.set_factors(row, layer.model_factors)


def with_sinks(tensors: RowTensors, num_sinks: int, wanted: int) -> RowTensors:
    """What a row holds, with slots for ``wanted`` sinks instead of ``num_sinks``; those that go must be unused."""

    def resized(x: Tensor) -> Tensor:
        return torch.cat((functional.pad(x[:, :num_sinks], (0, 0, 0, wanted - num_sinks)), x[:, num_sinks:]), dim=1)

    of_sinks = ("sink_keys", "sink_values") if "sink_keys" in tensors else ("keys", "values")
    return {name: resized(x) if name in of_sinks else x for name, x in tensors.items()}
