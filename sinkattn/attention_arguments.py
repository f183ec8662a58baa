"""The attention operator's arguments, shared by operator, fake kernel, checks and Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
