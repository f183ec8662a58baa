"""Swapping sinkattn into the attention of a loaded transformers model, and out again.

Only transformers' own extension points are used: an attention function, a mask function and a cache; on this one model,
a hook on the rotary module and a wrapper around the decoder's forward. Code of no class is changed. Families that call
no attention function have an adapter, with a forward for their attention modules.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from sinkattn import ops
from sinkattn.hf import adapters
from sinkattn.hf.cache.layers import SinkLayer, StatefulSinkLayer
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.inputs import can_read_on_host, check_positions, new_token_mask, stream_positions
from sinkattn.hf.model_config import modules_with, rope_parameters, with_attention
from sinkattn.hf.probe.result import ProbeResult, Rotation
from sinkattn.hf.probe.rotations import no_rotation
from sinkattn.hf.swap.stream_patch import StreamPatch
from sinkattn.hf.unsupported import UnsupportedModelError
from sinkattn.hf.versions import native_layers
from sinkattn.rope import table_dtype

NAME = "sinkattn"


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """What layers of one kind share: how they rotate, and what of the stream they keep."""

    index: int
    rotation: Rotation | None
    layout: ops.RingLayout


class Padding(NamedTuple):
    """Which of the new tokens count."""

    lengths: Tensor
    """How many in each row: int64 ``[batch]``."""
    token_mask: Tensor
    """Which ones: bool ``[batch, tokens]``."""
    order: Tensor | None
    """Indices that put those that count first, ``[batch, tokens]``; None for a single token."""


@dataclass
class RunningForward:
    """One forward of an enabled model under way."""

    patch: RingPatch
    cache: SinkCache
    tokens: int
    padding: Padding | None
    positions: Tensor
    """Within the cache: ``[1 or batch, tokens]``."""
    layers_run: int = 0
    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines by number of kind."""


# Per thread, and a forward within a forward has its own.
_running: ContextVar[RunningForward | None] = ContextVar("sinkattn_running", default=None)


# Layers of a cache whose keys and values a ring can keep instead.
REPLACED = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer", "LinearAttentionAndFullAttentionLayer"}


REPLACED |= {"LinearAttentionAndSlidingWindowAttentionLayer"}


class RingPatch(StreamPatch):
    """What `enable` leaves on a model that rotates: its rotary embeddings, and what puts them to use."""

    def __init__(
        self, model: PreTrainedModel, layout: ops.RingLayout, backend: ops.Backend, probe_result: ProbeResult
    ) -> None:
        super().__init__(model, probe_result.decoder, layout)
        self.backend = backend
        self.probe_result = probe_result
        self._check_decoder()
        self.groups = self._layer_groups()
        # In place of the context variable, which torch.compile cannot see through, while it traces.
        self._traced: RunningForward | None = None

    def _check_decoder(self) -> None:
        name = type(self.model).__name__
        needed = {self.cache_argument or "cache", "attention_mask"}
        if not self.probe_result.forwards:
            needed.add("position_ids")  # those with ALiBi take none
        if missing := needed - set(self.parameters):
            raise UnsupportedModelError(f"{name}: its decoder takes no {', '.join(sorted(missing))}")
        found = {layer.index for layer in self.probe_result.layers.values()}
        native = native_layers(self.decoder.config)
        for index in found - set(range(len(native))):
            raise UnsupportedModelError(f"{name}: layer {index} attends, but its cache has {len(native)} layers")
        for index, layer in enumerate(native):
            kind = type(layer).__name__
            if index in found and kind not in REPLACED:
                raise UnsupportedModelError(f"{name}: layer {index} keeps its past in a {kind}, which no ring can be")
            if index not in found and isinstance(layer, CacheLayerMixin):
                raise UnsupportedModelError(
                    f"{name}: layer {index} keeps keys and values, but does not call transformers' attention function"
                )

    def _layer_groups(self) -> dict[nn.Module, LayerGroup]:
        layers, layout = self.probe_result.layers, self.layout
        # A model whose layers all have a window is bounded to the sinks and the window asked for like any other.
        mixed = any(layer.visible.kind != "window" for layer in layers.values())
        groups: dict[tuple[Rotation | None, ops.RingLayout], LayerGroup] = {}
        by_module: dict[nn.Module, LayerGroup] = {}
        for module, layer in layers.items():
            what, size = layer.visible
            own = layout
            if what == "window" and mixed:
                own = ops.RingLayout(0, size, layout.headroom)
            elif what != "all" and layout.num_sinks + layout.window > size:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: layer {layer.index} sees a {what} of {size} tokens; num_sinks + "
                    f"window must not exceed it, got {layout.num_sinks + layout.window}"
                )
            by_module[module] = groups.setdefault((layer.rotation, own), LayerGroup(len(groups), layer.rotation, own))
        return by_module

    def cache_layers(self, state: SharedCacheState) -> list[Any]:
        """Layers of a new cache: rings for attention, transformers' own for other kinds of state."""
        layers = native_layers(self.decoder.config)
        for module, group in self.groups.items():
            index = self.probe_result.layers[module].index
            native = layers[index]
            if isinstance(native, LinearAttentionCacheLayerMixin):
                layers[index] = StatefulSinkLayer(state, group.layout, native.number_of_states)
            else:
                layers[index] = SinkLayer(state, group.layout)
        return layers

    def install(self) -> None:
        """Put the swap in place."""
        super().install()
        for module in self.groups:
            self.set_attribute(module, "_sinkattn", self)
        for module, layer in self.probe_result.layers.items():
            if layer.temperature is not None:
                self.set_attribute(module, "attn_temperature_tuning", False)
        longrope = any(rope.get("rope_type") == "longrope" for rope in rope_parameters(self.model))
        if longrope and hasattr(type(self.model), "generate"):
            # Theirs drops the cache where other frequencies would begin, which never happens within sinks + window.
            prepare = partial(GenerationMixin.prepare_inputs_for_generation, self.model)
            self.set_attribute(self.model, "prepare_inputs_for_generation", prepare)
        self._hooks += [rotary.register_forward_hook(no_rotation) for rotary in self.probe_result.rotaries]
        for module, forward in self.probe_result.forwards.items():
            self.set_forward(module, forward)
        before = self.decoder.config
        own = with_attention(before, adapters.MASK_NAME if self.probe_result.forwards else NAME)
        for module in modules_with(self.decoder, before):
            self.set_attribute(module, "config", own)

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder: checks its arguments, provides cache and positions, and counts the tokens after."""
        kwargs = self.by_name(args, kwargs)
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return self.run_decoder(**kwargs)  # which says what is missing
        batch, tokens = inputs.shape[:2]
        cache = self.stream_of(kwargs, batch, tokens)
        if torch.is_grad_enabled():
            # Here, before any layer has changed a state.
            ops.check_no_gradients(*self.decoder.parameters(), kwargs.get("inputs_embeds"))
        padding = _padding(kwargs.get("attention_mask"), cache, tokens)
        token_mask = None if padding is None else padding.token_mask
        positions = stream_positions(cache, token_mask, tokens, inputs.device)
        if not cache.counts_from_prompt:  # which counts from where it began
            check_positions(kwargs.get("position_ids"), positions, token_mask)

        # The rotary modules rotate by nothing now; whatever else goes by position sees the position within the cache.
        last = self.layout.num_sinks + self.layout.window - 1
        positions = positions.clamp(max=last)
        provided = {self.cache_argument: cache, "attention_mask": None, "position_ids": positions}
        kwargs |= {name: value for name, value in provided.items() if name in self.parameters}
        cache.begin_forward(batch, tokens, kwargs.get("input_ids"))
        finished, running = False, RunningForward(self, cache, tokens, padding, positions)
        before = self._enter(running)
        try:
            output = self.run_decoder(**kwargs)
            if running.layers_run != len(self.groups):
                raise RuntimeError(f"expected {len(self.groups)} attention layers to run, got {running.layers_run}")
            finished = True
            return output
        finally:
            self._enter(before)
            if finished:
                cache.finish_forward(token_mask)
            else:
                cache.abandon_forward(written=running.layers_run > 0)

    def _enter(self, running: RunningForward | None) -> RunningForward | None:
        # Returns what was running before.
        if torch.compiler.is_dynamo_compiling():
            before, self._traced = self._traced, running
        else:
            before = _running.get()
            _running.set(running)
        return before

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        dropout: float = 0.0,
        **options,
    ) -> Tensor:
        """Attention of one layer over its ring."""
        if dropout:
            raise RuntimeError(f"dropout: sinkattn is for inference, call model.eval(); got {dropout}")
        # What is traced has no context variable; what runs after a break of its graph finds it empty.
        running = self._traced if torch.compiler.is_dynamo_compiling() else _running.get() or self._traced
        if running is None or running.patch is not self:
            raise RuntimeError(
                "attention modules of an enabled model run only as part of the model; if they did, the forward of its "
                "decoder was replaced since: call sinkattn.disable(model), and enable it again"
            )
        if (skipped := key.shape[2] - query.shape[2]) > 0:
            # Some models leave out queries whose outputs nobody will read (Gemma 4, in a prompt).
            query = functional.pad(query, (0, 0, skipped, 0))
        layer = running.cache.layers[module.layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key, value)
        # Under autocast queries and keys come in fp32, like their rotary embedding, and a stream may enter it midway.
        dtype = value.dtype
        query, key, value = (x.to(layer.values.dtype) for x in (query, key, value))
        ring, group, padding = layer.ring, self.groups[module], running.padding
        num_sinks, window = group.layout.num_sinks, group.layout.window
        cos = sin = rope = None
        if group.rotation is not None:
            rope, begin = group.rotation
            if begin:
                # The kernels rotate the first elements of a head; products do not care for their order.
                query, key = (torch.cat((x[..., begin:], x[..., :begin]), dim=-1) for x in (query, key))
            if group.index not in running.tables:
                # Once per forward: all layers of a kind rotate by the same angles.
                running.tables[group.index] = rope.stream_tables(
                    ring.seen, running.tokens, num_sinks=num_sinks, window=window, dtype=table_dtype(key.dtype)
                )
            cos, sin = running.tables[group.index]
        if (temperature := self.probe_result.layers[module].temperature) is not None:
            steps = ((running.positions.float() + 1) / temperature.step).floor()
            query = (query * (1 + temperature.scale * steps.log1p())[:, None, :, None]).to(query.dtype)
        if padding is not None and padding.order is not None:
            query, key, value = (_reorder_tokens(x, padding.order) for x in (query, key, value))
        refused = False
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
                num_sinks=num_sinks,
                window=window,
                scale=scale,
                interleaved=rope is not None and rope.interleaved,
                lengths=None if padding is None else padding.lengths,
                alibi_slopes=self.probe_result.layers[module].alibi_slopes,
                arrivals=ring.arrivals,
                backend=self.backend,
                **options,
            )
        except Exception:
            refused = True  # before anything was written
            raise
        finally:
            running.layers_run += not refused
        if padding is not None and padding.order is not None:
            out = _reorder_tokens(out, padding.order.argsort(dim=1))
        return out[:, :, skipped:].to(dtype)


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
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function of enabled models, as transformers calls it: returns ``[batch, tokens, heads, head_dim]``."""
    patch = module.__dict__.get("_sinkattn")
    if patch is None:
        raise RuntimeError(f"attn_implementation {NAME!r} is set by sinkattn.enable(model), not by hand")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = patch.attend(module, query, key, value, scale, dropout=dropout, softcap=softcap, sink_logits=s_aux)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args, **kwargs) -> None:
    """Mask function of an attention function that masks by itself."""
    return None


AttentionInterface.register(NAME, _attention_forward)


AttentionMaskInterface.register(NAME, _no_mask)


def _padding(attention_mask: Tensor | None, cache: SinkCache, tokens: int) -> Padding | None:
    """Padding among the new tokens, anywhere in their rows; None if there is none."""
    if cache.has_states and attention_mask is not None and not can_read_on_host(attention_mask, tokens):
        return None  # a single token is none of padding where there has been none before
    token_mask = new_token_mask(attention_mask, cache, tokens)
    if token_mask is None:
        return None
    cache.check_padding(token_mask)
    order = None if tokens == 1 else (~token_mask).to(torch.int8).argsort(dim=1, stable=True)
    return Padding(token_mask.sum(dim=1), token_mask, order)
