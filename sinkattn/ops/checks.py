"""Checks of arguments: each error names the argument, the rule and the value."""

from __future__ import annotations

import math
from numbers import Real
from types import MappingProxyType

import torch
from torch import SymFloat, Tensor

from sinkattn.argument_checks import check_tensors
from sinkattn.attention_arguments import AttentionArguments, EightBit
from sinkattn.rope import table_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRITON_DTYPES = DTYPES[:3]
EIGHT_BIT_DTYPES = MappingProxyType({"int8": torch.int8, "fp8": torch.float8_e4m3fn})
TRITON_MAX_DIM = 256


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError for another shape, TypeError for another dtype or device, or for what is no tensor."""
    check_tensors(**{name: x})
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
    if x.device != device:
        raise TypeError(f"{name}: expected device {device}, got {x.device}")


def _check_numbers(name: str, x: Tensor, most: int) -> None:
    """Check that no row has less than 0 or more than ``most``, of numbers on the CPU.

    On a GPU reading them would synchronise; the kernels clamp there.
    """
    if x.is_cpu:
        for row, number in enumerate(x.tolist()):
            if not 0 <= number <= most:
                raise RuntimeError(f"{name}: expected 0 to {most}, got {number} in row {row}")


def check_new_tokens(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    lengths: Tensor | None,
    eight_bit: EightBit,
    *,
    num_sinks: int,
    rows: Tensor | None,
    row_sinks: Tensor | None,
) -> None:
    """Check new tokens against the cache that they are appended to (shapes: `sinkattn.ops.append_`)."""
    dtype = _check_cache_dtype(keys, values, eight_bit, num_sinks)
    if key.ndim != 4:
        raise ValueError(f"key: expected [batch, kv_heads, tokens, head_dim], got {list(key.shape)}")
    cache_rows, kv_heads, _, head_dim = keys.shape
    batch, tokens = key.shape[0] if rows is not None else cache_rows, key.shape[2]
    check_tensor("key", key, (batch, kv_heads, tokens, head_dim), dtype, keys.device)
    check_tensor("value", value, (batch, kv_heads, tokens, values.shape[3]), dtype, keys.device)
    check_tensor("seen", seen, (batch,), torch.int64, keys.device)
    for name, x, most in (
        ("lengths", lengths, tokens),
        ("rows", rows, cache_rows - 1),
        ("row_sinks", row_sinks, num_sinks),
    ):
        if x is not None:
            check_tensor(name, x, (batch,), torch.int64, keys.device)
            _check_numbers(name, x, most)
    if rows is not None and rows.is_cpu and len(set(numbers := rows.tolist())) < batch:
        raise RuntimeError(f"rows: expected different rows, got {numbers}")


def _check_cache_dtype(keys: Tensor, values: Tensor, eight_bit: EightBit, num_sinks: int) -> torch.dtype:
    """Check what a ring of 8 bits has beside keys and values, or that any other has none of it.

    Returns the dtype of new tokens.
    """
    is_eight_bit = keys.dtype in EIGHT_BIT_DTYPES.values()
    for name, x in eight_bit._asdict().items():
        if (x is not None) != is_eight_bit:
            expected, got = ("a tensor", "None") if x is None else ("None", "a tensor")
            raise ValueError(f"{name}: expected {expected} beside a cache of {keys.dtype}, got {got}")
    sink_keys, sink_values, key_scales, value_scales = eight_bit
    if sink_keys is None or sink_values is None or key_scales is None or value_scales is None:
        return keys.dtype
    if sink_keys.dtype not in TRITON_DTYPES:
        raise TypeError(f"sink_keys: expected one of {TRITON_DTYPES}, got {sink_keys.dtype}")
    rows, kv_heads, ring, head_dim = keys.shape
    check_tensor("values", values, (rows, kv_heads, ring, values.shape[3]), keys.dtype, keys.device)
    for name, x, dim in (("sink_keys", sink_keys, head_dim), ("sink_values", sink_values, values.shape[3])):
        check_tensor(name, x, (rows, kv_heads, num_sinks, dim), sink_keys.dtype, keys.device)
    for name, x in (("key_scales", key_scales), ("value_scales", value_scales)):
        check_tensor(name, x, (rows, kv_heads, ring, 1), torch.float32, keys.device)
    return sink_keys.dtype


def check_attention(call: AttentionArguments) -> None:
    """Check the shapes, dtypes and devices of a call against each other, and that the layout fits the cache."""
    keys, query, cos, sin = call.keys, call.query, call.cos, call.sin
    if query.ndim != 4:
        raise ValueError(f"query: expected [batch, heads, tokens, head_dim], got {list(query.shape)}")
    check_new_tokens(
        keys,
        call.values,
        call.key,
        call.value,
        call.seen,
        call.lengths,
        call.eight_bit,
        num_sinks=call.num_sinks,
        rows=call.rows,
        row_sinks=call.row_sinks,
    )
    if call.begins is not None:
        check_tensor("begins", call.begins, tuple(call.seen.shape), torch.int64, keys.device)
        if call.begins.is_cpu:
            for row, (begin, seen) in enumerate(zip(call.begins.tolist(), call.seen.tolist(), strict=True)):
                if not 0 <= begin <= seen:
                    raise RuntimeError(f"begins: expected 0 to the tokens seen, {seen}, got {begin} in row {row}")
    slots = keys.shape[2] + (0 if call.sink_keys is None else call.num_sinks)
    if not 0 <= call.num_sinks < slots:
        raise ValueError(f"num_sinks: expected 0 to {slots - 1}, got {call.num_sinks}")
    if not 1 <= call.window <= slots - call.num_sinks:
        raise ValueError(f"window: expected 1 to {slots - call.num_sinks}, got {call.window}")
    batch, heads, tokens, head_dim = query.shape
    check_tensor("query", query, (call.key.shape[0], heads, call.key.shape[2], keys.shape[3]), call.dtype, keys.device)
    if heads % keys.shape[1] or not heads:
        raise ValueError(f"query: expected heads to be a multiple of kv_heads ({keys.shape[1]}), got {heads}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or none")
    if cos is not None and sin is not None:
        shape = (2, batch, tokens, cos.shape[-1])
        for name, x in (("cos", cos), ("sin", sin)):
            check_tensor(name, x, shape, table_dtype(call.dtype), keys.device)
        if 2 * cos.shape[-1] > head_dim:
            raise ValueError(
                f"cos: expected at most {head_dim // 2} pairs for head_dim {head_dim}, got {cos.shape[-1]}"
            )


def check_score_options(
    query: Tensor, scale: float, softcap: float | None, sink_logits: Tensor | None, alibi_slopes: Tensor | None
) -> None:
    """Check the arguments that change the scores."""
    if not isinstance(scale, (Real, SymFloat)) or not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    if softcap is not None and not (isinstance(softcap, (Real, SymFloat)) and softcap > 0):
        raise ValueError(f"softcap: expected more than 0, or None, got {softcap!r}")
    for name, x in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if x is not None and x.shape != query.shape[1:2]:
            raise ValueError(f"{name}: expected shape {list(query.shape[1:2])}, got {list(x.shape)}")


def check_triton(call: AttentionArguments) -> None:
    """Check what only the Triton kernels need of a call that `check_attention` has passed: dtypes and contiguity."""
    keys, values = call.keys, call.values
    check_tensor("values", values, (*keys.shape[:3], values.shape[3]), keys.dtype, keys.device)
    if call.dtype not in TRITON_DTYPES:
        raise TypeError(f"keys: expected one of {TRITON_DTYPES} for the triton backend, got {call.dtype}")
    if keys.dtype == torch.float8_e4m3fn and lacks_fp8(keys.device):
        raise TypeError(
            f"keys: expected torch.int8 on {keys.device}, as the triton backend needs compute capability 8.9 for fp8, "
            f"got {keys.dtype}"
        )
    for name, x in (("keys", keys), ("values", values)):
        if not 1 <= x.shape[3] <= TRITON_MAX_DIM:
            raise ValueError(
                f"{name}: expected a head_dim of 1 to {TRITON_MAX_DIM} for the triton backend, got {x.shape[3]}"
            )
    for name in ("sink_logits", "alibi_slopes"):
        if (x := getattr(call, name)) is not None:
            check_tensor(name, x, tuple(x.shape), torch.float32, keys.device)
    if call.arrivals is not None:
        check_tensor("arrivals", call.arrivals, tuple(call.key.shape[:2]), torch.int32, keys.device)
    int64_names = ("seen", "lengths", "rows", "row_sinks", "begins")
    for name in ("keys", "values", *EightBit._fields, *int64_names, "arrivals", "sink_logits", "alibi_slopes"):
        if (x := getattr(call, name)) is not None and not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {x.stride()}")


def lacks_fp8(device: torch.device) -> bool:
    """Whether it is a GPU for which the Triton kernels cannot be compiled with fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


def check_no_gradients(*inputs: Tensor | None) -> None:
    """Refuse inputs that require gradients, while they are recorded, of operators without any."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError(
            "sinkattn computes no gradients for this input: detach it, or call this under torch.no_grad()"
        )


def check_has_gradients(call: AttentionArguments) -> None:
    """Refuse, in a call that autograd records, what its backward does not know: 8 bits, and options of each row."""
    if call.sink_keys is not None:
        raise RuntimeError(
            "keys: expected a ring of full precision in a call that autograd records, as there are no gradients with "
            "one of 8 bits; call this under torch.no_grad()"
        )
    for name in ("rows", "row_sinks", "begins"):
        if getattr(call, name) is not None:
            raise RuntimeError(
                f"{name}: expected None in a call that autograd records, got a tensor: there are no gradients with it; "
                "call this under torch.no_grad()"
            )


def check_same_device(keys: Tensor, **others: Tensor | None) -> None:
    """Raise TypeError for a tensor on another device than ``keys``.

    For fake kernels: one meta tensor among real ones dispatches to them, and they would silently compute nothing.
    """
    for name, x in others.items():
        if x is not None and x.device != keys.device:
            raise TypeError(f"{name}: expected device {keys.device}, got {x.device}")
