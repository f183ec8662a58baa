"""The boundary to compiled code: argument checks, operators, backends. Nothing else names ``_C`` or ``torch.ops``.

Functions that end in an underscore write to their first arguments; the schemas say so, and fake kernels let
``torch.compile`` see through them.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sinkattn import reference
from sinkattn.rope import table_dtype

try:
    from sinkattn._C import RingLayout, build_info
except ImportError as error:
    raise ImportError(
        "sinkattn: the compiled part is missing; build it with: pip install --no-build-isolation -e . "
        "(or: python setup.py build_ext --inplace)"
    ) from error
torch.ops.load_library(Path(__file__).with_name("_ops.abi3.so"))
_sink_attention = torch.ops.sinkattn.sink_attention_.default

__all__ = [
    "Backend",
    "RingLayout",
    "append_",
    "build_info",
    "cpu_capability",
    "linearise",
    "reorder_",
    "reset_",
    "rollback_",
    "select_backend",
    "sink_attention_",
]

Backend = Literal["auto", "cpu", "triton", "reference"]
BACKENDS: tuple[Backend, ...] = ("auto", "cpu", "triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRITON_DTYPES = DTYPES[:3]
TRITON_MAX_DIM = 256


def select_backend(
    device: torch.device, requested: Backend = "auto", dtype: torch.dtype | None = None
) -> Literal["cpu", "triton", "reference"]:
    """Backend that will run on ``device``; the environment variable SINKATTN_BACKEND overrides ``requested``.

    "auto" is the C++ kernel on CPU tensors and Triton on CUDA tensors; where Triton cannot run it is plain PyTorch,
    with a warning that says why (in what torch.compile has traced it is an error). With a ``dtype`` of float64, which
    Triton does not take, it is plain PyTorch too.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a backend that cannot run there, saying why.
    """
    override = os.environ.get("SINKATTN_BACKEND")
    source, wanted = ("SINKATTN_BACKEND", override) if override else ("backend", requested)
    if wanted not in BACKENDS:
        raise ValueError(f"{source}: expected one of {BACKENDS}, got {wanted!r}")
    # What stands against Triton cannot be looked up while torch.compile traces: the operator does it when it runs.
    traced = torch.compiler.is_dynamo_compiling()
    if wanted == "auto":
        if device.type == "cpu":
            return "cpu"
        if device.type != "cuda" or dtype == torch.float64:
            return "reference"
        if not traced and (obstacle := _triton_obstacle(device)):
            warnings.warn(f"sinkattn: plain PyTorch runs on {device}, slowly: {obstacle}", RuntimeWarning, stacklevel=2)
            return "reference"
        return "triton"
    if wanted == "cpu" and device.type != "cpu":
        raise RuntimeError(f"{source}: 'cpu' runs on CPU tensors, got tensors on {device}")
    if wanted == "triton" and not traced and (obstacle := _triton_obstacle(device)):
        raise RuntimeError(f"{source}: 'triton' cannot run: {obstacle}")
    return wanted


@functools.cache
def _triton_obstacle(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device; None if they can."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        # Triton's interpreter, for tests and debugging.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "it needs CUDA tensors, or TRITON_INTERPRET=1 set for CPU tensors"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"it needs CUDA tensors, got tensors on {device}"
    if not build_info()["cuda"]:
        return "sinkattn was built without CUDA; build it where nvcc is, with SINKATTN_CUDA=1"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or later, {device} has {major}.{minor}"
    return None


def check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError (shape) or TypeError (dtype, device) naming the argument, what was expected and what came."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {x.dtype}")
    if x.device != device:
        raise TypeError(f"{name}: expected device {device}, got {x.device}")


def check_new_tokens(
    keys: Tensor, values: Tensor, key: Tensor, value: Tensor, seen: Tensor, lengths: Tensor | None
) -> None:
    """Check new tokens against the cache they are for (see `append_` for shapes)."""
    if key.ndim != 4:
        raise ValueError(f"key: expected [batch, kv_heads, tokens, head_dim], got {list(key.shape)}")
    batch, kv_heads, _, head_dim = keys.shape
    tokens = key.shape[2]
    check_tensor("key", key, (batch, kv_heads, tokens, head_dim), keys.dtype, keys.device)
    check_tensor("value", value, (batch, kv_heads, tokens, values.shape[3]), keys.dtype, keys.device)
    check_tensor("seen", seen, (batch,), torch.int64, keys.device)
    if lengths is not None:
        check_tensor("lengths", lengths, (batch,), torch.int64, keys.device)
        if lengths.is_cpu:  # elsewhere reading them would stop the device; kernels there clamp
            for row, count in enumerate(lengths.tolist()):
                if not 0 <= count <= tokens:
                    raise RuntimeError(f"lengths: expected 0 to {tokens}, got {count} in row {row}")
    check_no_gradients(key, value)


def check_layout(keys: Tensor, num_sinks: int, window: int) -> None:
    """Check that sinks and window fit the slots of the cache."""
    slots = keys.shape[2]
    if not 0 <= num_sinks < slots:
        raise ValueError(f"num_sinks: expected 0 to {slots - 1}, got {num_sinks}")
    if not 1 <= window <= slots - num_sinks:
        raise ValueError(f"window: expected 1 to {slots - num_sinks}, got {window}")


def check_attention(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_sinks: int,
    window: int,
) -> None:
    """Check the tensors of `sink_attention_` against each other."""
    if query.ndim != 4:
        raise ValueError(f"query: expected [batch, heads, tokens, head_dim], got {list(query.shape)}")
    check_new_tokens(keys, values, key, value, seen, lengths)
    check_layout(keys, num_sinks, window)
    batch, heads, tokens, head_dim = query.shape
    check_tensor("query", query, (keys.shape[0], heads, key.shape[2], keys.shape[3]), keys.dtype, keys.device)
    if heads % keys.shape[1] or not heads:
        raise ValueError(f"query: expected heads to be a multiple of kv_heads ({keys.shape[1]}), got {heads}")
    if (cos is None) != (sin is None):
        raise ValueError("cos, sin: expected both or none")
    if cos is not None:
        shape = (2, batch, tokens, cos.shape[-1])
        for name, x in (("cos", cos), ("sin", sin)):
            check_tensor(name, x, shape, table_dtype(keys.dtype), keys.device)
        if 2 * cos.shape[-1] > head_dim:
            raise ValueError(
                f"cos: expected at most {head_dim // 2} pairs for head_dim {head_dim}, got {cos.shape[-1]}"
            )


def check_score_options(
    query: Tensor, scale: float, softcap: float | None, sink_logits: Tensor | None, alibi_slopes: Tensor | None
) -> None:
    """Check what `sink_attention_` does to the scores."""
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected more than 0, or None, got {softcap}")
    for name, x in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if x is not None and x.shape != query.shape[1:2]:
            raise ValueError(f"{name}: expected shape {list(query.shape[1:2])}, got {list(x.shape)}")


def check_memory(
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    lengths: Tensor | None,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    arrivals: Tensor | None,
) -> None:
    """Check what the Triton kernels take for granted of tensors whose shapes are right."""
    check_tensor("values", values, (*keys.shape[:3], values.shape[3]), keys.dtype, keys.device)
    if keys.dtype not in TRITON_DTYPES:
        raise TypeError(f"keys: expected one of {TRITON_DTYPES} for the triton backend, got {keys.dtype}")
    for name, x in (("keys", keys), ("values", values)):
        if not 1 <= x.shape[3] <= TRITON_MAX_DIM:
            raise ValueError(
                f"{name}: expected a head_dim of 1 to {TRITON_MAX_DIM} for the triton backend, got {x.shape[3]}"
            )
    for name, x in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if x is not None:
            check_tensor(name, x, tuple(x.shape), torch.float32, keys.device)
    if arrivals is not None:
        check_tensor("arrivals", arrivals, tuple(keys.shape[:2]), torch.int32, keys.device)
    tensors = {"keys": keys, "values": values, "seen": seen, "lengths": lengths, "arrivals": arrivals}
    for name, x in {**tensors, "sink_logits": sink_logits, "alibi_slopes": alibi_slopes}.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {x.stride()}")


def check_no_gradients(*inputs: Tensor | None) -> None:
    """Refuse inputs that gradients are wanted of."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError("sinkattn computes no gradients: call it under torch.no_grad() or torch.inference_mode()")


def append_(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    *,
    num_sinks: int,
    lengths: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Write new tokens into their slots, each key rotated once; leaves ``seen`` as it is.

    Args:
        keys, values: ``[batch, kv_heads, slots, head_dim]`` the cache, contiguous; written in place.
        key, value: ``[batch, kv_heads, tokens, head_dim]`` any strides, dtype of the cache, key not yet rotated.
        seen: int64 ``[batch]`` tokens appended before.
        num_sinks: sink tokens; the other slots are the ring.
        lengths: int64 ``[batch]`` how many of ``tokens`` each row really brings; all when None.
        cos, sin: ``[batch, tokens, pairs]`` rotary tables for the new tokens; None writes the key as it is.
        interleaved: pairs are neighbours.

    Raises:
        ValueError, TypeError: shape, dtype or device of an argument.
        RuntimeError: lengths out of range, or gradients wanted.
    """
    check_new_tokens(keys, values, key, value, seen, lengths)
    torch.ops.sinkattn.append_(keys, values, key, value, seen, lengths, cos, sin, num_sinks, interleaved)


def rollback_(seen: Tensor, peak: Tensor, counts: Tensor, *, headroom: int) -> None:
    """Forget the last ``counts`` ``[batch]`` tokens of every row; ``peak`` keeps the most that was ever appended.

    All int64 ``[batch]``. Raises RuntimeError, with nothing changed, when a row cannot go back that far.
    """
    torch.ops.sinkattn.rollback_(seen, peak, counts, headroom)


def reorder_(keys: Tensor, values: Tensor, source: Tensor) -> None:
    """Row i becomes what row ``source[i]`` was, in place. source: int64 ``[batch]``; rows that stay cost nothing."""
    torch.ops.sinkattn.reorder_(keys, values, source)


def reset_(keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """Zero the cache of ``rows`` (int64), so that nothing of an old stream is left in memory."""
    torch.ops.sinkattn.reset_(keys, values, rows)


def linearise(keys: Tensor, values: Tensor, seen: Tensor, *, num_sinks: int, window: int) -> tuple[Tensor, Tensor]:
    """Time-ordered copy ``[batch, kv_heads, num_sinks + window, head_dim]`` of sinks and window, zeros behind."""
    return torch.ops.sinkattn.linearise(keys, values, seen, num_sinks, window)


def _check_devices(keys: Tensor, **others: Tensor | None) -> None:
    # One meta tensor among real ones is enough to bring a call to a fake kernel, which would do nothing in silence.
    for name, x in others.items():
        if x is not None and x.device != keys.device:
            raise TypeError(f"{name}: expected device {keys.device}, got {x.device}")


@torch.library.register_fake("sinkattn::append_")
def _(keys, values, key, value, seen, lengths, cos, sin, num_sinks, interleaved) -> None:
    _check_devices(keys, values=values, key=key, value=value, seen=seen, lengths=lengths, cos=cos, sin=sin)


@torch.library.register_fake("sinkattn::rollback_")
def _(seen, peak, counts, headroom) -> None:
    return None


@torch.library.register_fake("sinkattn::reorder_")
def _(keys, values, source) -> None:
    return None


@torch.library.register_fake("sinkattn::reset_")
def _(keys, values, rows) -> None:
    return None


@torch.library.register_fake("sinkattn::linearise")
def _(keys, values, seen, num_sinks, window) -> tuple[Tensor, Tensor]:
    batch, kv_heads, _, head_dim = keys.shape
    shape = (batch, kv_heads, num_sinks + window)
    return keys.new_empty(*shape, head_dim), values.new_empty(*shape, values.shape[3])


@torch.library.register_fake("sinkattn::sink_attention_")
def _(
    keys,
    values,
    query,
    key,
    value,
    seen,
    lengths,
    cos,
    sin,
    num_sinks,
    window,
    scale,
    interleaved,
    sink_logits,
    softcap,
    alibi_slopes,
    arrivals,
) -> Tensor:
    _check_devices(
        keys,
        values=values,
        query=query,
        key=key,
        value=value,
        seen=seen,
        lengths=lengths,
        cos=cos,
        sin=sin,
        sink_logits=sink_logits,
        alibi_slopes=alibi_slopes,
        arrivals=arrivals,
    )
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, values.shape[3]).transpose(1, 2)


MAX_CHECKED = 1024
_checked: set[tuple] = set()


def _attend_with_triton(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_sinks: int,
    window: int,
    scale: float,
    interleaved: bool,
    sink_logits: Tensor | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    arrivals: Tensor | None,
) -> Tensor:
    # Once for each kind of call: all this would take longer than the launch.
    tensors = (keys, values, query, key, value, seen, lengths, cos, sin, sink_logits, alibi_slopes, arrivals)
    facts = tuple(None if x is None else (x.dtype, x.device, x.shape, x.stride()) for x in tensors)
    call = (*facts, num_sinks, window, scale, softcap)
    if call not in _checked or keys.is_cpu:
        if obstacle := _triton_obstacle(keys.device):
            raise RuntimeError(f"backend: 'triton' cannot run: {obstacle}")
        check_attention(keys, values, query, key, value, seen, lengths, cos, sin, num_sinks, window)
        check_score_options(query, scale, softcap, sink_logits, alibi_slopes)
        check_memory(keys, values, seen, lengths, sink_logits, alibi_slopes, arrivals)
        if len(_checked) >= MAX_CHECKED:
            _checked.clear()
        _checked.add(call)
    for name, x in (("keys", keys), ("values", values)):
        if x.data_ptr() % 16:
            raise ValueError(f"{name}: expected memory that starts at a multiple of 16 bytes")
    from sinkattn.kernels.attention import attend  # and with it Triton, not before

    out, appended = attend(
        keys,
        values,
        query,
        key,
        value,
        seen,
        lengths,
        cos,
        sin,
        num_sinks,
        window,
        scale,
        interleaved,
        sink_logits,
        softcap,
        alibi_slopes,
        arrivals,
    )
    if not appended:
        tables = (None, None) if cos is None else (cos[0], sin[0])
        torch.ops.sinkattn.append_(keys, values, key, value, seen, lengths, *tables, num_sinks, interleaved)
    return out.transpose(1, 2)


torch.library.impl("sinkattn::sink_attention_", "cuda", _attend_with_triton)


def cpu_capability() -> str:
    """Instruction set that the CPU kernel uses: amx, avx512, avx2, or default (SSE2 or NEON).

    The best that the processor has; the environment variable ATEN_CPU_CAPABILITY, which limits torch, limits it too.
    """
    return torch.ops.sinkattn.cpu_capability()


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
    backend: Backend = "auto",
) -> Tensor:
    """Append new tokens to the ring and attend; the output for a token depends on the tokens it sees alone.

    Args:
        keys, values, key, value, seen, lengths, interleaved: as for `append_`.
        query: ``[batch, heads, tokens, head_dim]``, not yet rotated; heads a multiple of kv_heads.
        cos, sin: ``[2, batch, tokens, pairs]`` from `Rope.stream_tables`, or None for no rotary embedding.
        num_sinks, window: the layout; the slots beyond them are headroom.
        scale: factor on the scores.
        sink_logits: ``[heads]`` learned extra logit of each head, without a value.
        softcap: ``softcap * tanh(scores / softcap)``.
        alibi_slopes: ``[heads]`` bias of minus slope times cache-relative distance.
        arrivals: int32 ``[batch, kv_heads]`` zeros, and zeros again afterwards: where programs of a GPU count who is
            last. Not to be shared by calls that may overlap. Made anew for each call when None.
        backend: see `select_backend`.

    Returns:
        ``[batch, heads, tokens, value_dim]``; zeros for tokens beyond ``lengths``.

    Raises:
        ValueError, TypeError: shape, dtype or device of an argument.
        RuntimeError: a backend that cannot run here, or gradients wanted.
    """
    check_no_gradients(query, key, value, sink_logits, alibi_slopes)
    chosen = select_backend(keys.device, backend, keys.dtype)
    if chosen == "reference":
        check_attention(keys, values, query, key, value, seen, lengths, cos, sin, num_sinks, window)
        check_score_options(query, scale, softcap, sink_logits, alibi_slopes)
        return reference.sink_attention_(
            keys,
            values,
            query,
            key,
            value,
            seen,
            cos,
            sin,
            num_sinks=num_sinks,
            window=window,
            interleaved=interleaved,
            lengths=lengths,
            scale=scale,
            sink_logits=sink_logits,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
    check_score_options(query, scale, softcap, sink_logits, alibi_slopes)
    if sink_logits is not None:
        sink_logits = sink_logits.to(keys.device, table_dtype(keys.dtype)).contiguous()
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.to(keys.device, table_dtype(keys.dtype)).contiguous()
    # On the CPU the operator is the C++ kernel, and Triton is its interpreter.
    attend = _attend_with_triton if chosen == "triton" and keys.is_cpu else _sink_attention
    try:
        return attend(
            keys,
            values,
            query,
            key,
            value,
            seen,
            lengths,
            cos,
            sin,
            num_sinks,
            window,
            scale,
            interleaved,
            sink_logits,
            softcap,
            alibi_slopes,
            arrivals,
        )
    except RuntimeError:
        # The operator refuses all that these do, in fewer words and a tenth of the time.
        check_attention(keys, values, query, key, value, seen, lengths, cos, sin, num_sinks, window)
        raise
