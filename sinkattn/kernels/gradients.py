"""Launches of the backward kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sinkattn.kernels.attention import Launch, get_target
from sinkattn.kernels.backward import key_gradients_kernel, query_gradients_kernel
from sinkattn.kernels.configs import backward_config, block_size
from sinkattn.kernels.primitives import LOG2_E


class GradientInputs(NamedTuple):
    """What the kernels read. Tensors are contiguous, of one dtype but for those in fp32.

    rows: new queries of a KV head, ``tokens * GROUP + query head`` for each token.
    """

    window_query: Tensor
    """``[batch, kv_heads, rows, head_dim]``, rotated for window keys."""
    sink_query: Tensor
    """The same, rotated for sink keys."""
    keys: Tensor
    """``[batch, kv_heads, past + tokens, head_dim]``, in order of time, rotated; past: num_sinks + window, or 0."""
    values: Tensor
    gradient: Tensor
    """Of the output: ``[batch, kv_heads, rows, value_dim]``."""
    delta: Tensor
    """Products of outputs and their gradients: fp32 ``[batch, kv_heads, rows]``."""
    seen: Tensor
    """int64 ``[batch]``, before the call."""
    lengths: Tensor | None
    sink_logits: Tensor | None
    alibi_slopes: Tensor | None
    tokens: int
    num_sinks: int
    window: int
    scale: float
    softcap: float | None


class Gradients(NamedTuple):
    """In fp32; those of queries, by window keys and by sinks, and of keys are of the rotated ones."""

    window_query: Tensor
    sink_query: Tensor
    key: Tensor
    """``[batch, kv_heads, tokens, head_dim]``."""
    value: Tensor
    log_sums: Tensor
    """Base-2 logarithms of the softmax sums: ``[batch, kv_heads, rows]``."""


def gradients(inputs: GradientInputs) -> Gradients:
    """Gradients of one call of attention."""
    query, key_sizes = inputs.window_query, (*inputs.keys.shape[:2], inputs.tokens)

    def new(*sizes: int) -> Tensor:
        return torch.zeros(sizes, dtype=torch.float32, device=query.device)

    result = Gradients(
        new(*query.shape),
        new(*query.shape),
        new(*key_sizes, query.shape[3]),
        new(*key_sizes, inputs.values.shape[3]),
        new(*query.shape[:3]),
    )
    with torch.cuda.device_of(query):
        for launch, tensors in launches(inputs, result):
            launch.run(tensors)
    return result


def launches(inputs: GradientInputs, result: Gradients) -> list[tuple[Launch, dict[str, Tensor | None]]]:
    """The two launches, with their tensors."""
    query, value_dim, softcap = inputs.window_query, inputs.values.shape[3], inputs.softcap
    batch, kv_heads, rows, head_dim = query.shape
    config = backward_config(block_size(max(head_dim, value_dim)), query.dtype, get_target(query.device))
    numbers = {
        "tokens": inputs.tokens,
        "kv_heads": kv_heads,
        "past": inputs.keys.shape[2] - inputs.tokens,
        "window": inputs.window,
        "num_sinks": inputs.num_sinks,
        "scale": inputs.scale * LOG2_E if softcap is None else inputs.scale / softcap,
        "cap": None if softcap is None else softcap * LOG2_E,
        "factor": inputs.scale,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "GROUP": rows // inputs.tokens,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": block_size(head_dim),
        "BLOCK_V": block_size(value_dim),
        "UPCAST": query.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }
    tensors = {name: x for name, x in inputs._asdict().items() if isinstance(x, Tensor) or x is None}
    tensors |= {"window_dquery": result.window_query, "sink_dquery": result.sink_query, "log_sums": result.log_sums}
    tensors |= {"dkey": result.key, "dvalue": result.value}
    # Gradients of keys and values are two sums for each key; with as many queries they would spill registers.
    key_block_m = max(16, config.block_m // 2)
    blocks = triton.cdiv(rows, config.block_m), triton.cdiv(inputs.tokens, config.block_n)
    kernels = (query_gradients_kernel, key_gradients_kernel)
    return [
        (
            Launch(kernel, (count * batch * kv_heads,), numbers | {"BLOCK_M": block_m}),
            {name: tensors[name] for name in kernel.arg_names if name in tensors},
        )
        for kernel, count, block_m in zip(kernels, blocks, (config.block_m, key_block_m), strict=True)
    ]
