"""GPT-NeoX-Japanese: rotary embedding, and an output bias that the block adds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkattn.hf.adapters.common import attend, module_rotation, split_heads
from sinkattn.hf.probe.result import Rotation


def position_encoding(decoder: Any) -> tuple[Rotation, None]:
    """Rotary embedding."""
    return module_rotation(decoder.rotary_emb), None


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None, Tensor | None]:
    """Forward of the attention module."""
    heads = module.num_attention_heads
    query, key, value = split_heads(module.query_key_value(hidden_states), heads, heads)
    out = attend(module, query, key, value, module.head_size**-0.5)
    return module.dense(out), None, module.dense_bias
