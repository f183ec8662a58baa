"""GPT-J: rotary embedding of neighbouring elements, on part of each head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkattn.hf.adapters.common import attend, sinusoidal_rotation
from sinkattn.hf.probe.result import Rotation


def position_encoding(decoder: Any) -> tuple[Rotation, None]:
    """Rotary embedding."""
    return sinusoidal_rotation(decoder.h[0].attn), None


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Forward of the attention module."""
    query, key, value = (
        projection(hidden_states).unflatten(-1, (module.num_attention_heads, module.head_dim)).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    out = attend(module, query, key, value, module.head_dim**-0.5)
    return module.resid_dropout(module.out_proj(out)), None
