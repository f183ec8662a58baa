"""CodeGen: GPT-J with one projection, laid out for the four processors it was trained on."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.adapters.common import attend, sinusoidal_rotation
from sinkattn.hf.probe.result import Rotation

PROCESSORS = 4


def positions(decoder: PreTrainedModel) -> tuple[Rotation, None]:
    """Rotation, and no slopes."""
    return sinusoidal_rotation(decoder.h[0].attn), None


def forward(module: nn.Module, hidden_states: Tensor, *args, **kwargs) -> tuple[Tensor, None]:
    """Forward of the attention module."""
    # Of each processor: the queries of its heads, then their values, then their keys.
    heads = module.num_attention_heads // PROCESSORS
    fused = module.qkv_proj(hidden_states).unflatten(-1, (PROCESSORS, 3, heads, module.head_dim))
    query, value, key = fused.permute(3, 0, 2, 4, 1, 5).flatten(2, 3)
    out = attend(module, query, key, value, module.head_dim**-0.5)
    return module.resid_dropout(module.out_proj(out)), None
