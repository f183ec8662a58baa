"""BLOOM: ALiBi."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sinkattn.hf.adapters.common import attend, split_heads


def position_encoding(decoder: Any) -> tuple[None, Tensor]:
    """ALiBi slopes."""
    # The bias of the second token is the slope times its position, which is 1.
    two_tokens = torch.ones(1, 2, dtype=torch.int64, device=decoder.word_embeddings.weight.device)
    return None, decoder.build_alibi_tensor(two_tokens, decoder.num_heads, dtype=torch.float32)[:, 0, 1]


def forward(module: Any, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Forward of the attention module, which adds the residual."""
    query, key, value = split_heads(module.query_key_value(hidden_states), module.num_heads, module.num_heads)
    out = attend(module, query, key, value, module.inv_norm_factor)
    if module.pretraining_tp > 1 and module.slow_but_exact:
        # The family sums over slices of the weight and leaves the bias out.
        out = functional.linear(out, module.dense.weight)
    else:
        out = module.dense(out)
    return residual + functional.dropout(out, module.hidden_dropout, module.training), None
