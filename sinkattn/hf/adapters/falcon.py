"""Falcon: rotary embedding or ALiBi, with multi-query, grouped-query or multi-head attention.

transformers rounds the whole ALiBi bias of Falcon to bfloat16, whatever the model's dtype. This adapter rounds only the
slopes, which gives the same bias up to eight heads and 256 tokens. With 32 heads and random weights, logits at a
thousand tokens differ by a few percent of their spread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sinkattn.hf.adapters.common import attend, module_rotation, split_heads
from sinkattn.hf.probe.result import Rotation
from sinkattn.hf.unsupported import UnsupportedModelError


def position_encoding(decoder: Any) -> tuple[Rotation | None, Tensor | None]:
    """Rotary embedding or ALiBi slopes."""
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    if not decoder.use_alibi:
        return module_rotation(decoder.rotary_emb), None
    if decoder.config._attn_implementation != "sdpa":
        # Eager attention adds the bias to the scores although the mask already contains it.
        raise UnsupportedModelError(
            f"{type(decoder).__name__}: with ALiBi only attn_implementation='sdpa' computes what the model was trained "
            f"for; got {decoder.config._attn_implementation!r}, which adds the bias twice or not at all"
        )
    heads, device = decoder.num_heads, decoder.word_embeddings.weight.device
    # The bias of the second token is the slope, rounded to bfloat16. The family scales scores and bias alike.
    bias = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64, device=device), heads, dtype=torch.float32)
    return None, bias[:, 0, 1] * decoder.h[0].self_attention.inv_norm_factor


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Forward of the attention module."""
    query, key, value = split_heads(module.query_key_value(hidden_states), module.num_kv_heads, module.num_heads)
    out = attend(module, query, key, value, module.inv_norm_factor)
    return module.dense(out), None
