"""Arguments of the operators, shared by operator, fake kernel, checks and Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EightBit(NamedTuple):
    """What a ring of 8 bits has beside its keys and values; all None for any other ring.

    `sinkattn.ops.append_` documents each.
    """

    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class AttentionArguments(NamedTuple):
    """Arguments of the operator ``sinkattn::sink_attention_``, in the order of its schema (csrc/ops.cpp).

    `sinkattn.ops.sink_attention_` documents each.
    """

    keys: Tensor
    values: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
    lengths: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    num_sinks: int
    window: int
    scale: float
    interleaved: bool
    sink_logits: Tensor | None
    softcap: float | None
    alibi_slopes: Tensor | None
    arrivals: Tensor | None
    rows: Tensor | None
    row_sinks: Tensor | None
    begins: Tensor | None
    sink_keys: Tensor | None = None
    sink_values: Tensor | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def eight_bit(self) -> EightBit:
        """What the ring has beside its keys and values, if it is of 8 bits."""
        return EightBit(self.sink_keys, self.sink_values, self.key_scales, self.value_scales)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of query, key, value and output."""
        return self.keys.dtype if self.sink_keys is None else self.sink_keys.dtype
