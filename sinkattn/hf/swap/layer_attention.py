"""Attention of one layer of an enabled model: rotate, append to the layer's ring, and attend over it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from sinkattn import ops
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.probe.result import LayerInfo, Rotation, Temperature
from sinkattn.hf.swap.key_factors import apply_factors
from sinkattn.ring_cache import RingKVCache
from sinkattn.rope import Rope, table_dtype

ATTENTION_NAME = "sinkattn"


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers with the same rotary embedding and ring layout."""

    index: int
    rotation: Rotation | None
    layout: ops.RingLayout


class Padding(NamedTuple):
    """Padding among the new tokens."""

    num_new: Tensor
    """Tokens of each row that are not padding: int64 ``[batch]``."""
    token_mask: Tensor
    """False at padding: bool ``[batch, tokens]``."""
    order: Tensor | None
    """Indices that move padding to the end of each row, int64 ``[batch, tokens]``; None for a single token."""


class RingTensors(NamedTuple):
    """What attention reads and writes of a ring; see `RingKVCache`."""

    keys: Tensor
    values: Tensor
    seen: Tensor
    arrivals: Tensor | None
    """None: allocated by the call."""
    dtype: torch.dtype
    eight_bit: dict[str, Any]
    key_factors: Tensor | None = None
    """See `SinkLayer`."""


def _unseen_by_modes() -> AbstractContextManager[Any]:
    """Hides copies of rings from selective checkpointing, which expects the same operators in both runs of a layer."""
    from torch.utils._python_dispatch import _disable_current_modes  # private, and only needed for gradients

    return _disable_current_modes()


@dataclass
class RunningForward:
    """State of one forward of an enabled model."""

    patch: ModelPatch
    cache: SinkCache
    num_tokens: int
    """New tokens per row, padding included."""
    padding: Padding | None
    positions: Tensor
    """Cache-relative positions: ``[1 or batch, tokens]``."""
    num_layers_run: int = 0
    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines by index of layer group."""
    rings_before: dict[int, RingTensors] | None = None
    """Each layer's ring before it ran, not of 8 bits; None if no layer runs again for its gradients."""
    is_rerun: bool = False
    """Whether layers run again, on copies of these rings instead of the cache."""

    def ring_tensors(self, index: int, key: Tensor, value: Tensor) -> RingTensors:
        """The ring of a layer that gets these keys and values."""
        if self.is_rerun:
            assert self.rings_before is not None
            with _unseen_by_modes():
                keys, values, seen = (
                    x.clone(memory_format=torch.contiguous_format) for x in self.rings_before[index][:3]
                )
            return RingTensors(keys, values, seen, None, keys.dtype, {})
        layer = self.cache.layers[index]
        if not layer.is_initialized:
            layer.lazy_initialization(key, value)
        own: RingKVCache = layer.ring
        counters = self.cache.ring_counters(own)
        ring = RingTensors(own.keys, own.values, *counters, own.dtype, own.eight_bit, layer.key_factors)
        if self.rings_before is not None:
            with _unseen_by_modes():
                # An empty ring takes no memory here.
                is_empty = ring.seen.is_cpu and not ring.seen.any()
                keys, values, seen = (x.new_zeros(()).expand(x.shape) if is_empty else x.clone() for x in ring[:3])
            self.rings_before[index] = RingTensors(keys, values, seen, None, keys.dtype, {})
        return ring

    def rotary_tables(
        self,
        group: LayerGroup,
        layout: ops.RingLayout,
        rope: Rope,
        seen: Tensor,
        dtype: torch.dtype,
        row_sinks: Tensor | None = None,
        begins: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a group, whose rotation is ``rope``; computed once per forward."""
        if group.index not in self.tables:
            self.tables[group.index] = rope.stream_tables(
                seen,
                self.num_tokens,
                num_sinks=layout.num_sinks,
                window=layout.window,
                dtype=table_dtype(dtype),
                row_sinks=row_sinks,
                begins=begins,
            )
        return self.tables[group.index]


def attend_over_ring(
    forward: RunningForward,
    info: LayerInfo,
    group: LayerGroup,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    backend: ops.Backend,
    **options: Any,
) -> Tensor:
    """Append new keys and values to the ring of a layer, and attend over it.

    Args:
        forward: the forward that runs.
        info: how the layer masks, rotates and scales.
        group: the layer's group.
        query: ``[batch, heads, tokens, head_dim]``, not rotated, as are keys.
        key: ``[batch, KV heads, tokens, head_dim]``.
        value: ``[batch, KV heads, tokens, value_dim]``.
        scale: factor on the scores.
        backend: which kernels run.
        options: further arguments of `ops.sink_attention_`.

    Returns:
        ``[batch, heads, tokens, value_dim]``, in the dtype of ``value``.
    """
    if (num_missing := key.shape[2] - query.shape[2]) > 0:
        # Some models drop queries whose outputs are not needed (Gemma 4, in a prompt).
        query = functional.pad(query, (0, 0, num_missing, 0))
    ring = forward.ring_tensors(info.index, key, value)
    layout = forward.cache.layers[info.index].layout
    row_options = forward.cache.row_options(layout)
    if (factors := ring.key_factors) is not None:
        rows = row_options.get("rows")
        query, key = apply_factors(query, key, factors if rows is None else factors[rows])
    # Under autocast rotated queries and keys are in fp32, and a stream may enter or leave autocast between calls.
    dtype = value.dtype
    query, key, value = (x.to(ring.dtype) for x in (query, key, value))
    padding = forward.padding
    cos = sin = None
    is_interleaved = False
    if group.rotation is not None:
        rope, offset = group.rotation
        is_interleaved = rope.interleaved
        if offset:
            # The kernels rotate the first elements of a head. Scores do not depend on the order of elements.
            query, key = (torch.cat((x[..., offset:], x[..., :offset]), dim=-1) for x in (query, key))
        cos, sin = forward.rotary_tables(group, layout, rope, ring.seen, key.dtype, **row_options)
    if info.temperature is not None:
        query = _scale_queries(query, info.temperature, forward.positions)
    order = None if padding is None else padding.order
    if order is not None:
        query, key, value = (_reorder_tokens(x, order) for x in (query, key, value))
    was_refused = False
    try:
        out = ops.sink_attention_(
            ring.keys,
            ring.values,
            query,
            key,
            value,
            ring.seen,
            cos,
            sin,
            num_sinks=layout.num_sinks,
            window=layout.window,
            scale=scale,
            interleaved=is_interleaved,
            lengths=None if padding is None else padding.num_new,
            alibi_slopes=info.alibi_slopes,
            arrivals=ring.arrivals,
            backend=backend,
            **row_options,
            **ring.eight_bit,
            **options,
        )
    except Exception:
        was_refused = True  # nothing has been written
        raise
    finally:
        forward.num_layers_run += not was_refused
    if order is not None:
        out = _reorder_tokens(out, order.argsort(dim=1))
    return out[:, :, num_missing:].to(dtype)


def _scale_queries(query: Tensor, temperature: Temperature, positions: Tensor) -> Tensor:
    steps = ((positions.float() + 1) / temperature.step).floor()
    return (query * (1 + temperature.scale * steps.log1p())[:, None, :, None]).to(query.dtype)


def _reorder_tokens(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of enabled models, as transformers calls it: returns ``[batch, tokens, heads, head_dim]``."""
    patch = module.__dict__.get("_sinkattn")
    if patch is None:
        raise RuntimeError(f"attn_implementation: {ATTENTION_NAME!r} is set by sinkattn.enable(model), not by hand")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = patch.attend(module, query, key, value, scale, dropout=dropout, softcap=softcap, sink_logits=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Mask function of enabled models: the kernels mask by themselves."""
    return None


AttentionInterface.register(ATTENTION_NAME, _attention_forward)
AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)
