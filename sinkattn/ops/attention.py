"""The attention operator: its public function, its fake kernel, and its CUDA kernel, which is Triton's.

The CPU kernel is C++ (csrc/attention.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sinkattn.ops.library  # noqa: F401  (registers the operators)
from sinkattn import reference
from sinkattn.attention_arguments import AttentionArguments
from sinkattn.ops import gradients
from sinkattn.ops.backends import Backend, select_backend, triton_obstacle
from sinkattn.ops.checks import (
    check_attention,
    check_has_gradients,
    check_no_gradients,
    check_same_device,
    check_score_options,
    check_triton,
)
from sinkattn.ops.gradients import attend_with_gradients, needs_gradients
from sinkattn.rope import table_dtype

_operator = torch.ops.sinkattn.sink_attention_.default

# Of calls that have been checked, the `CallShape` by everything but values and addresses.
MAX_SHAPES = 1024
_shapes: dict[tuple, Any] = {}


def sink_attention_(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    num_sinks: int,
    window: int,
    scale: float,
    interleaved: bool = False,
    lengths: Tensor | None = None,
    sink_logits: Tensor | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    arrivals: Tensor | None = None,
    rows: Tensor | None = None,
    row_sinks: Tensor | None = None,
    begins: Tensor | None = None,
    sink_keys: Tensor | None = None,
    sink_values: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Append new tokens to the ring and attend; a token's output depends only on the tokens it sees.

    Args:
        keys, values, key, value, seen, lengths, interleaved, rows, row_sinks: as for `append_`.
        sink_keys, sink_values, key_scales, value_scales: as for `append_`.
        query: ``[batch, heads, tokens, head_dim]``, not yet rotated; heads a multiple of kv_heads.
        cos, sin: ``[2, batch, tokens, pairs]`` from `Rope.stream_tables`, or None for no rotary embedding.
        num_sinks, window: the layout; the slots beyond them are headroom.
        scale: factor on the scores.
        sink_logits: ``[heads]`` learned extra logit of each head, without a value (gpt-oss).
        softcap: ``softcap * tanh(scores / softcap)`` (Gemma 2).
        alibi_slopes: ``[heads]`` bias of minus slope times cache-relative distance (arXiv 2108.12409).
        arrivals: int32 ``[batch, kv_heads]`` completion counters of the KV splits on a GPU, zero on entry and exit.
            Calls that may overlap must not share them. None allocates them for this call.
        begins: int64 ``[batch]`` first token of each row that a window may hold, up to ``seen``; 0 when None. Sinks are
            always seen.
        backend: see `select_backend`.

    Returns:
        ``[batch, heads, tokens, value_dim]``; zeros for tokens beyond ``lengths``. It has gradients for ``query``,
        ``key``, ``value`` and ``sink_logits``; what the ring held before is a constant.

    Raises:
        ValueError, TypeError: shape, dtype or device of an argument.
        RuntimeError: lengths, rows, row_sinks or begins out of range; a backend that cannot run here; gradients for
            ``alibi_slopes``, or of a call with rows, row_sinks, begins or a ring of 8 bits.
    """
    check_no_gradients(alibi_slopes)
    dtype = keys.dtype if sink_keys is None else sink_keys.dtype
    chosen = select_backend(keys.device, backend, dtype)
    if chosen != "reference":
        check_score_options(query, scale, softcap, sink_logits, alibi_slopes)
        if sink_logits is not None:
            sink_logits = sink_logits.to(keys.device, table_dtype(dtype)).contiguous()
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.to(keys.device, table_dtype(dtype)).contiguous()
    call = AttentionArguments(
        keys, values, query, key, value, seen, lengths, cos, sin, num_sinks, window, scale, interleaved,
        sink_logits, softcap, alibi_slopes, arrivals, rows, row_sinks, begins, sink_keys, sink_values,
        key_scales, value_scales,
    )  # fmt: skip
    is_recorded = needs_gradients(call)
    if is_recorded:
        check_has_gradients(call)
    if chosen == "reference":
        check_attention(call)
        check_score_options(query, scale, softcap, sink_logits, alibi_slopes)
        attend = _attend_in_pytorch
    else:
        # For CPU tensors the operator dispatches to the C++ kernel, so Triton's interpreter is called directly.
        attend = _attend_with_triton if chosen == "triton" and keys.is_cpu else _operator
    try:
        if is_recorded:
            return attend_with_gradients(attend, call, _backward_kernel(chosen))
        return attend(*call)
    except RuntimeError:
        # The operator has validated its arguments already; these checks only give a better message.
        check_attention(call)
        raise


def _backward_kernel(backend: Backend) -> gradients.BackwardKernel | None:
    """What computes the gradients of a call on a backend."""
    if backend == "triton":
        return "triton" if gradients.TRITON_BACKWARD else None
    return "cpu" if backend == "cpu" else None


def _attend_in_pytorch(*arguments: Any) -> Tensor:
    named = AttentionArguments(*arguments)._asdict()
    del named["arrivals"]
    return reference.sink_attention_(**named)


@torch.library.register_fake("sinkattn::sink_attention_")
def _(*arguments: Any) -> Tensor:
    call = AttentionArguments(*arguments)
    check_same_device(**{name: x for name, x in call._asdict().items() if isinstance(x, Tensor)})
    batch, heads, tokens, _ = call.query.shape
    return call.query.new_empty(batch, tokens, heads, call.values.shape[3]).transpose(1, 2)


def _attend_with_triton(*arguments: Any) -> Tensor:
    call = AttentionArguments(*arguments)
    # Checks take longer than the launch, so a call like one before is not checked again, unless there are values to
    # check.
    described = tuple([(x.dtype, x.get_device(), x.shape, x.stride()) if isinstance(x, Tensor) else x for x in call])
    shape = _shapes.get(described)
    if shape is None and (obstacle := triton_obstacle(call.keys.device)):
        raise RuntimeError(f"backend: 'triton' cannot run: {obstacle}")
    from sinkattn.kernels.attention import attend, call_shape  # imports triton, which CPU-only users may lack

    numbers = (call.lengths, call.rows, call.row_sinks, call.begins)
    if shape is None or any(x is not None and x.is_cpu for x in numbers):
        check_attention(call)
        check_score_options(call.query, call.scale, call.softcap, call.sink_logits, call.alibi_slopes)
        check_triton(call)
        if len(_shapes) >= MAX_SHAPES:
            _shapes.clear()
        _shapes[described] = shape = call_shape(call)
    for name, x in (("keys", call.keys), ("values", call.values)):
        if x.data_ptr() % 16:
            raise ValueError(f"{name}: expected memory that starts at a multiple of 16 bytes")
    out, appended = attend(call, shape)
    if not appended:
        cos, sin = (None if tables is None else tables[0] for tables in (call.cos, call.sin))
        torch.ops.sinkattn.append_(
            call.keys, call.values, call.key, call.value, call.seen, call.lengths, cos, sin, call.num_sinks,
            call.interleaved, call.rows, call.row_sinks, *call.eight_bit,
        )  # fmt: skip
    return out.transpose(1, 2)


torch.library.impl("sinkattn::sink_attention_", "cuda", _attend_with_triton)
