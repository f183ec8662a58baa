"""MPT: ALiBi. transformers ignores the configuration and uses ALiBi with the default ``alibi_bias_max``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sinkattn.hf.adapters.common import attend


def position_encoding(decoder: Any) -> tuple[None, Tensor]:
    """ALiBi slopes."""
    # The bias of the first of two tokens, at distance -1 from the last.
    bias = decoder.build_mpt_alibi_tensor(decoder.num_heads, 2, device=decoder.wte.weight.device)
    return None, -bias[:, 0, 0]


def forward(module: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Forward of the attention module."""
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    query, key, value = fused.unflatten(-1, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    return module.out_proj(attend(module, query, key, value, module.softmax_scale)), None
