"""Operators on the ring: append, roll back, reorder, reset, linearise. Each has its fake kernel below it."""

from __future__ import annotations

import torch
from torch import Tensor

import sinkattn.ops.library  # noqa: F401  (registers the operators)
from sinkattn.attention_arguments import EightBit
from sinkattn.ops.checks import check_new_tokens, check_no_gradients, check_same_device


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
    rows: Tensor | None = None,
    row_sinks: Tensor | None = None,
    sink_keys: Tensor | None = None,
    sink_values: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Write new tokens into their slots, each key rotated once; does not change ``seen``.

    Args:
        keys, values: ``[batch, kv_heads, slots, head_dim]`` the cache, contiguous; written in place. With ``rows`` it
            may have more rows than the call. Of 8 bits (int8 or float8_e4m3fn) they are the ring alone, without slots
            for sinks, and the last four arguments are needed.
        key, value: ``[batch, kv_heads, tokens, head_dim]`` any strides, dtype of the cache (of the sinks, if the ring
            is of 8 bits), key not yet rotated.
        seen: int64 ``[batch]`` tokens appended before.
        num_sinks: slots for sink tokens; the others are the ring.
        lengths: int64 ``[batch]`` new tokens of each row, the others are padding; all ``tokens`` when None.
        cos, sin: ``[batch, tokens, pairs]`` rotary tables for the new tokens; None writes the key as it is.
        interleaved: the two elements of a pair are neighbours.
        rows: int64 ``[batch]`` the cache row of each row of the call, all different; row i when None.
        row_sinks: int64 ``[batch]`` sink tokens of each row, up to ``num_sinks``; so many when None. Slots that a row
            does not use stay as they are.
        sink_keys, sink_values: ``[batch, kv_heads, num_sinks, head_dim]`` sinks beside a ring of 8 bits, contiguous;
            float32, float16 or bfloat16; written in place.
        key_scales, value_scales: float32 ``[batch, kv_heads, slots, 1]`` what the elements of each vector of a ring of
            8 bits are multiplied by (`sinkattn.reference.quantise`), contiguous; written in place. Keys are rounded
            after a product with a Hadamard matrix (`sinkattn.reference.hadamard`), values as they are.

    Raises:
        ValueError, TypeError: shape, dtype or device of an argument.
        RuntimeError: lengths, rows or row_sinks out of range, or an input that requires gradients.
    """
    eight_bit = EightBit(sink_keys, sink_values, key_scales, value_scales)
    check_new_tokens(
        keys, values, key, value, seen, lengths, eight_bit, num_sinks=num_sinks, rows=rows, row_sinks=row_sinks
    )
    check_no_gradients(key, value)
    torch.ops.sinkattn.append_(
        keys, values, key, value, seen, lengths, cos, sin, num_sinks, interleaved, rows, row_sinks, *eight_bit
    )


@torch.library.register_fake("sinkattn::append_")
def _(
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    lengths: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_sinks: int,
    interleaved: bool,
    rows: Tensor | None,
    row_sinks: Tensor | None,
    *eight_bit: Tensor | None,
) -> None:
    others = {"values": values, "key": key, "value": value, "seen": seen, "lengths": lengths, "cos": cos, "sin": sin}
    check_same_device(keys, **others, rows=rows, row_sinks=row_sinks, **EightBit(*eight_bit)._asdict())


def rollback_(seen: Tensor, peak: Tensor, counts: Tensor, *, headroom: int) -> None:
    """Forget the last ``counts`` tokens of every row; ``peak`` is the most ever written to a row.

    All int64 ``[batch]``. Raises RuntimeError, with nothing changed, when a row cannot go back that far.
    """
    torch.ops.sinkattn.rollback_(seen, peak, counts, headroom)


@torch.library.register_fake("sinkattn::rollback_")
def _(seen: Tensor, peak: Tensor, counts: Tensor, headroom: int) -> None:
    return None


def reorder_(keys: Tensor, values: Tensor, source: Tensor) -> None:
    """Row i becomes what row ``source[i]`` (int64 ``[batch]``) was, in place; a row that stays is not copied.

    keys, values: any pair of tensors of a ring: its sinks and its scales too, if it is of 8 bits.
    """
    torch.ops.sinkattn.reorder_(keys, values, source)


@torch.library.register_fake("sinkattn::reorder_")
def _(keys: Tensor, values: Tensor, source: Tensor) -> None:
    return None


def reset_(keys: Tensor, values: Tensor, rows: Tensor) -> None:
    """Zero the cache of ``rows`` (int64), so that nothing of an old stream is left in memory.

    keys, values: as for `reorder_`.
    """
    torch.ops.sinkattn.reset_(keys, values, rows)


@torch.library.register_fake("sinkattn::reset_")
def _(keys: Tensor, values: Tensor, rows: Tensor) -> None:
    return None


def linearise(keys: Tensor, values: Tensor, seen: Tensor, *, num_sinks: int, window: int) -> tuple[Tensor, Tensor]:
    """Copy in order of time ``[batch, kv_heads, num_sinks + window, head_dim]``: sinks, window, then zeros."""
    return torch.ops.sinkattn.linearise(keys, values, seen, num_sinks, window)


@torch.library.register_fake("sinkattn::linearise")
def _(keys: Tensor, values: Tensor, seen: Tensor, num_sinks: int, window: int) -> tuple[Tensor, Tensor]:
    batch, kv_heads, _, head_dim = keys.shape
    shape = (batch, kv_heads, num_sinks + window)
    return keys.new_empty(*shape, head_dim), values.new_empty(*shape, values.shape[3])
