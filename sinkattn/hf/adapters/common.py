"""What adapters share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sinkattn.hf.probe.result import Rotation
from sinkattn.rope import Rope


def split_heads(fused: Tensor, kv_heads: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, ``[batch, heads, tokens, head_dim]``, of one projection for all.

    fused: ``[batch, tokens, ...]``: for each key head the queries of its group, then its key, then its value.
    """
    fused = fused.unflatten(-1, (kv_heads, heads // kv_heads + 2, -1))
    query, key, value = fused[..., :-2, :].flatten(2, 3), fused[..., -2, :], fused[..., -1, :]
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one layer over its ring, heads joined: ``[batch, tokens, heads * head_dim]``."""
    if module.training:
        raise RuntimeError(
            "model: an attention module is in training mode; sinkattn is for inference, call model.eval()"
        )
    return module._sinkattn.attend(module, query, key, value, scale).transpose(1, 2).flatten(2)


def live_rotation(rotary: nn.Module) -> Rotation:
    """Rotation by the frequencies of a rotary module, of the first elements of a head, in halves."""
    # A short input puts length-dependent frequencies back to those of short inputs.
    position = torch.zeros(1, 1, dtype=torch.int64, device=rotary.inv_freq.device)
    rotary(position.float(), position)
    return Rotation(Rope.from_module(rotary), 0)


def sinusoidal_rotation(attention: nn.Module) -> Rotation:
    """Rotation of neighbours by the frequencies of the original Transformer, as in GPT-J.

    Its tables of sines and cosines end at the longest trained position and are as coarse as the model's dtype.
    """
    width = attention.rotary_dim or attention.embed_dim
    pairs = torch.arange(0, width, 2, dtype=torch.int64)
    return Rotation(Rope(1.0 / 10000 ** (pairs / width), style="interleaved"), 0)
