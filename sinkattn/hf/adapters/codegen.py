"""CodeGen: GPT-J with a fused projection, sharded for the four devices that it was trained on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkattn.hf.adapters.common import attend, sinusoidal_rotation
from sinkattn.hf.probe.result import Rotation

NUM_SHARDS = 4  # mp_num in transformers


def position_encoding(decoder: Any) -> tuple[Rotation, None]:
    """Rotary embedding."""
    return sinusoidal_rotation(decoder.h[0].attn), None


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Forward of the attention module."""
    # For each shard: the queries, then the values, then the keys of its heads.
    heads = module.num_attention_heads // NUM_SHARDS
    fused = module.qkv_proj(hidden_states).unflatten(-1, (NUM_SHARDS, 3, heads, module.head_dim))
    query, value, key = fused.permute(3, 0, 2, 4, 1, 5).flatten(2, 3)
    out = attend(module, query, key, value, module.head_dim**-0.5)
    return module.resid_dropout(module.out_proj(out)), None
