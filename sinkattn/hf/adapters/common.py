"""Functions that several adapters use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.probe.result import Rotation
from sinkattn.rope import Rope

# Where the families keep the dropout of their attention, a number or a module.
DROPOUT_NAMES = ("attention_dropout", "attn_dropout", "attn_dropout_p")


def _probability(dropout: Any) -> float:
    return getattr(dropout, "p", dropout)


def split_heads(fused: Tensor, num_kv_heads: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of one projection into queries, keys and values, ``[batch, heads, tokens, head_dim]``.

    fused: ``[batch, tokens, ...]``: for each KV head the queries of its group, its key, its value.
    """
    fused = fused.unflatten(-1, (num_kv_heads, num_heads // num_kv_heads + 2, -1))
    query, key, value = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one layer over its ring: ``[batch, tokens, heads * head_dim]``."""
    if module.training and any(_probability(getattr(module, name, 0)) for name in DROPOUT_NAMES):
        raise RuntimeError(
            "dropout: expected 0 in attention; set it to 0 in the configuration before sinkattn.enable, or call "
            "model.eval()"
        )
    return module._sinkattn.attend(module, query, key, value, scale).transpose(1, 2).flatten(2)


def module_rotation(rotary: Any) -> Rotation:
    """Rotation of the first elements of each head, paired in halves, by the frequencies of a rotary module."""
    # A short input resets length-dependent frequencies to those of short inputs.
    position = torch.zeros(1, 1, dtype=torch.int64, device=rotary.inv_freq.device)
    rotary(position.float(), position)
    return Rotation(Rope.from_module(rotary), 0)


def sinusoidal_rotation(attention: Any) -> Rotation:
    """Rotation of neighbouring elements by the frequencies of the original Transformer, as in GPT-J.

    The family's own tables of sines and cosines are in the model's dtype and end at the longest trained position.
    """
    rotary_dim = attention.rotary_dim or attention.embed_dim
    even = torch.arange(0, rotary_dim, 2, dtype=torch.int64)
    return Rotation(Rope(1.0 / 10000 ** (even / rotary_dim), style="interleaved"), 0)
