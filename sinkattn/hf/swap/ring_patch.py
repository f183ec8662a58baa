"""Swap attention over rings into a loaded transformers model, and out again.

The patch uses extension points of transformers: an attention function, a mask function and a cache. On this one model
it adds a hook to each rotary module and wraps the decoder's forward; classes stay unchanged. For families that do not
call transformers' attention function, an adapter replaces the forwards of the attention modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from sinkattn import ops
from sinkattn.hf import adapters
from sinkattn.hf.cache.layers import SinkLayer, StatefulSinkLayer
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.cache.state import SharedCacheState
from sinkattn.hf.inputs import can_read_on_host, check_positions, new_token_mask, stream_positions
from sinkattn.hf.model_config import config_with_attention, modules_with_config, rope_parameters
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.probe.result import ProbeResult, Rotation
from sinkattn.hf.probe.rotations import identity_rotation_hook
from sinkattn.hf.swap.captured_step import NewGraph
from sinkattn.hf.swap.compiled_step import CompiledStep
from sinkattn.hf.swap.layer_attention import ATTENTION_NAME, LayerGroup, Padding, RunningForward, attend_over_ring
from sinkattn.hf.swap.linear_layers import (
    LinearForward,
    has_replaced_weights,
    is_quantized,
    linear_forward,
    restore_forwards,
)
from sinkattn.hf.swap.step_graphs import StepGraphs
from sinkattn.hf.swap.stream_patch import StreamPatch
from sinkattn.hf.unsupported import UnsupportedModelError
from sinkattn.hf.versions import has_cache, native_layers
from sinkattn.ring_cache import CacheDtype

# Cache layers of transformers whose keys and values a ring can replace.
REPLACEABLE_LAYERS = {
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DummyLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}

# Per thread; a forward within a forward replaces it until it returns.
_running: ContextVar[RunningForward | None] = ContextVar("sinkattn_running", default=None)


class Checkpointed(NamedTuple):
    """Takes the place of the function that runs layers of an enabled model with gradient checkpointing."""

    patch: RingPatch
    checkpoint: Callable[..., Any]

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a layer, now and again in the backward."""
        return self.patch.run_checkpointed(self.checkpoint, layer, *args, **kwargs)


class RingPatch(StreamPatch):
    """Patch of a model without absolute positions: each attention layer gets a ring.

    Attributes:
        key_factors: of layers that have some, ``[kv_heads, head_dim]``, for new streams
            (`sinkattn.hf.swap.key_factors`); only with rings of 8 bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: ops.RingLayout,
        backend: ops.Backend,
        probe_result: ProbeResult,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        super().__init__(model, probe_result.decoder, layout)
        self.backend = backend
        self.cache_dtype = cache_dtype
        self.probe_result = probe_result
        self._check_decoder()
        self.groups = self._layer_groups()
        self.key_factors: dict[nn.Module, Tensor] = {}
        # Replaces `_running` during torch.compile, which cannot trace context variables.
        self._traced: RunningForward | None = None
        self._compiled_step: CompiledStep | None = None
        self._step_graphs: StepGraphs | None = None
        self._quantized_forwards: list[LinearForward] = []

    def _check_decoder(self) -> None:
        name = type(self.model).__name__
        needed = {self.cache_argument, "attention_mask"}
        if not self.probe_result.adapter_forwards:
            needed.add("position_ids")  # some families with ALiBi do not take it
        if missing := needed - set(self.parameters):
            raise UnsupportedModelError(
                f"{name}: expected a decoder with the arguments {sorted(needed)}, got one without {sorted(missing)}"
            )
        attention_layers = {layer.index for layer in self.probe_result.layers.values()}
        native = native_layers(self.decoder.config)
        for index in attention_layers - set(range(len(native))):
            raise UnsupportedModelError(
                f"{name}: layer {index} attends, but transformers' cache for this model has {len(native)} layers"
            )
        for index, layer in enumerate(native):
            kind = type(layer).__name__
            if index in attention_layers and kind not in REPLACEABLE_LAYERS:
                raise UnsupportedModelError(
                    f"{name}: layer {index} has a cache layer of type {kind}, which a ring cannot replace"
                )
            if index not in attention_layers and isinstance(layer, CacheLayerMixin):
                raise UnsupportedModelError(
                    f"{name}: layer {index} caches keys and values, but does not call transformers' attention function"
                )

    def _layer_groups(self) -> dict[nn.Module, LayerGroup]:
        """Group of each attention module. Refuses a layout that does not fit into a window or chunk of the model."""
        layers, layout = self.probe_result.layers, self.layout
        # Beside other layers, those with a sliding window keep it. If all have one, they get the layout asked for.
        is_mixed = any(layer.mask.kind != "window" for layer in layers.values())
        groups: dict[tuple[Rotation | None, ops.RingLayout, bool], LayerGroup] = {}
        by_module: dict[nn.Module, LayerGroup] = {}
        for module, layer in layers.items():
            kind, size = layer.mask
            own_layout = layout
            if kind == "window" and is_mixed:
                own_layout = ops.RingLayout(0, size, layout.headroom)
            elif kind != "full" and layout.num_sinks + layout.window > size:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: layer {layer.index} sees a {kind} of {size} tokens; num_sinks + "
                    f"window must not exceed it, got {layout.num_sinks + layout.window}"
                )
            group = LayerGroup(len(groups), layer.rotation, own_layout)
            # A cache may have another number of sinks, except in windows of the model's own.
            by_module[module] = groups.setdefault((layer.rotation, own_layout, own_layout is layout), group)
        return by_module

    def cache_layers(self, state: SharedCacheState) -> list[Any]:
        """Layers of a new cache: rings for attention, transformers' own layers for other kinds of state."""
        layers = native_layers(self.decoder.config)
        for module, group in self.groups.items():
            index = self.probe_result.layers[module].index
            native = layers[index]
            layout = state.layout if group.layout is self.layout else group.layout
            factors = self.key_factors.get(module)
            if isinstance(native, LinearAttentionCacheLayerMixin):
                layers[index] = StatefulSinkLayer(state, layout, native.number_of_states, factors)
            else:
                layers[index] = SinkLayer(state, layout, factors)
        return layers

    def max_visible(self) -> int | None:
        """The most tokens, sinks and window, that a token may see; None without a limit."""
        # Layers that get the layout asked for see no more than the model's own windows.
        sizes = {
            layer.mask.size
            for module, layer in self.probe_result.layers.items()
            if layer.mask.kind != "full" and self.groups[module].layout is self.layout
        }
        sizes |= {size for size in (super().max_visible(),) if size is not None}
        return min(sizes, default=None)

    def install(self) -> None:
        """Patch the model."""
        super().install()
        for module in self.groups:
            self.set_attribute(module, "_sinkattn", self)
        for module, layer in self.probe_result.layers.items():
            if layer.temperature is not None:
                self.set_attribute(module, "attn_temperature_tuning", False)
        has_longrope = any(rope.get("rope_type") == "longrope" for rope in rope_parameters(self.model))
        if has_longrope and hasattr(type(self.model), "generate"):
            # The model's method drops the cache where longrope switches frequencies, by the length of the sequence. An
            # enabled model never switches: num_sinks + window fits into the length of the short ones.
            prepare: Callable = GenerationMixin.prepare_inputs_for_generation
            self.set_attribute(self.model, "prepare_inputs_for_generation", partial(prepare, self.model))
        for rotary in self.probe_result.rotary_modules:
            self._hooks.append(rotary.register_forward_hook(identity_rotation_hook))
        for module, forward in (self.probe_result.adapter_forwards | self.probe_result.unrotated_forwards).items():
            self.set_forward(module, forward)
        original = self.decoder.config
        name = adapters.MASK_NAME if self.probe_result.adapter_forwards else ATTENTION_NAME
        config = config_with_attention(original, name)
        for module in modules_with_config(self.decoder, original):
            self.set_attribute(module, "config", config)
        self._decoder_forward = self.original_forward(self.decoder)

    def replace_linear_forwards(self, *, compiled: bool) -> None:
        """Run linear layers on a CPU in kernels made for few tokens.

        If the decoder is compiled, only quantized ones in it: its graph replaces the others by itself.
        """
        inside = set(self.decoder.modules()) if compiled else ()
        for module in self.model.modules():
            if is_quantized(module) or module not in inside:
                forward = linear_forward(self, module)
                if forward is not None:
                    # Not by set_attribute: a layer that takes the place of this one would leave its weights there.
                    module.__dict__["forward"] = forward
                    if compiled and is_quantized(module):
                        self._quantized_forwards.append(forward)

    def remove(self) -> None:
        """See `ModelPatch`."""
        super().remove()
        restore_forwards(self)

    def capture_steps(self, new_graph: NewGraph) -> None:
        """Capture decode steps in graphs from now on."""
        is_compiled = self._compiled_step is not None
        self._step_graphs = StepGraphs(
            self._plain_step, self._fixed_step, self.decoder, new_graph, is_compiled=is_compiled
        )

    @property
    def captures_steps(self) -> bool:
        """Whether decode steps are captured, if they can be."""
        return self._step_graphs is not None and not self._step_graphs.has_given_up

    def describe_steps(self, cache: SinkCache) -> str:
        """How the decode steps of a cache run, and why."""
        kind = "" if self._compiled_step is None else "compiled, "
        return kind + ("launched one by one" if self._step_graphs is None else self._step_graphs.describe(cache))

    def compile_step(self) -> None:
        """Compile decode steps from now on, in the first one."""
        defaults = {"use_cache": True, "return_dict": self.config.return_dict}
        in_use = {name: value for name, value in defaults.items() if name in self.parameters}
        self._compiled_step = CompiledStep(self._run_step, self.run_decoder, in_use)

    def run_steps_plainly(self) -> None:
        """Neither compile decode steps nor capture them in graphs from now on."""
        self._compiled_step = self._step_graphs = None

    def _plain_step(self, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        """A decode step in this forward, compiled if it can be."""
        step = self._usable_compiled_step(running.cache)
        return self.run_decoder(**kwargs) if step is None else step(running, kwargs)

    def _usable_compiled_step(self, cache: SinkCache) -> CompiledStep | None:
        """The compiled step of a cache, unless it was compiled for quantized weights that have been replaced."""
        if not cache.can_compile or any(map(has_replaced_weights, self._quantized_forwards)):
            return None
        return self._compiled_step

    def _fixed_step(self, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        """A decode step for a graph of any length of the stream, within another forward."""
        previous = self._set_running(running)
        try:
            return (self._usable_compiled_step(running.cache) or self._run_step)(running, kwargs)
        finally:
            self._set_running(previous)

    def _run_step(self, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        previous, self._traced = self._traced, running
        running.cache.state.compiled_seq_length = running.cache.max_seq_length
        try:
            return self._decoder_forward(**kwargs)
        finally:
            self._traced = previous
            running.cache.state.compiled_seq_length = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the decoder: check the arguments, provide cache and positions, and advance ``seen`` at the end."""
        kwargs = self.named_arguments(args, kwargs)
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return self.run_decoder(**kwargs)  # raises the model's own error
        batch, num_tokens = inputs.shape[:2]
        goes_on = kwargs.get("use_cache") is not False or has_cache(kwargs)
        cache = self.checked_cache(kwargs, batch, num_tokens)
        is_recorded = self._is_recorded(kwargs.get("inputs_embeds"))
        if is_recorded and cache.has_states and goes_on:
            raise RuntimeError(  # before any layer has changed a state
                f"{type(self.model).__name__}: a model with a convolutional or recurrent state has gradients only for "
                "whole texts: pass use_cache=False and no cache, or call it under torch.no_grad()"
            )
        if is_recorded and self.cache_dtype is not None:
            raise RuntimeError(
                f"{type(self.model).__name__}: has no gradients with cache_dtype={self.cache_dtype!r}; call it under "
                "torch.no_grad(), or enable it without cache_dtype"
            )
        padding = _padding(kwargs.get("attention_mask"), cache, num_tokens)
        token_mask = None if padding is None else padding.token_mask
        positions = stream_positions(cache, token_mask, num_tokens, inputs.device)
        if not cache.counts_from_prompt:
            check_positions(kwargs.get("position_ids"), positions, token_mask)

        # Rotary modules return the identity now. Anything else that depends on position_ids gets the cache-relative
        # position.
        positions = cache.relative_positions(positions)
        provided = {self.cache_argument: cache, "attention_mask": None, "position_ids": positions}
        kwargs |= {name: value for name, value in provided.items() if name in self.parameters}
        cache.begin_forward(batch, num_tokens, kwargs.get("input_ids"))
        is_finished, may_have_written = False, False
        running = RunningForward(self, cache, num_tokens, padding, positions)
        if torch.is_grad_enabled() and self.cache_dtype is None and self._wrap_checkpointing():
            running.rings_before = {}
            is_recorded = True
        previous = self._set_running(running)
        try:
            can_step = num_tokens == 1 and cache.can_step and not is_recorded
            step = self._decode_step(padding, cache) if can_step else None
            if step is None:
                output = self.run_decoder(**kwargs)
            else:
                may_have_written = True  # layers are counted only at the end of a graph
                output = step(running, kwargs)
            if running.num_layers_run != len(self.groups):
                raise RuntimeError(f"expected {len(self.groups)} attention layers to run, got {running.num_layers_run}")
            is_finished = True
            return output
        finally:
            self._set_running(previous)
            if is_finished:
                cache.finish_forward(token_mask)
            else:
                cache.abandon_forward(written=may_have_written or running.num_layers_run > 0)

    def _is_recorded(self, embeddings: Tensor | None) -> bool:
        """Whether autograd records a forward."""
        if not torch.is_grad_enabled():
            return False
        if embeddings is not None and embeddings.requires_grad:
            return True
        # A hook may add something that learns, or let embeddings require gradients.
        embedding = self.decoder.get_input_embeddings()
        return bool(embedding._forward_hooks) or any(x.requires_grad for x in self.decoder.parameters())

    def _wrap_checkpointing(self) -> bool:
        """Let layers with gradient checkpointing find their forward when they run again; returns whether there are any.

        The function that runs them may be set, or set anew, at any time after `install`.
        """
        modules: Iterator[Any] = self.decoder.modules()
        found = [x for x in modules if x.training and getattr(x, "gradient_checkpointing", False)]
        for module in found:
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, Checkpointed):
                self.set_attribute(module, "_gradient_checkpointing_func", Checkpointed(self, checkpoint))
        return bool(found)

    def run_checkpointed(
        self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run ``checkpoint(layer, ...)``; the layer runs again in the backward, after the forward and in any thread."""
        running = _running.get() or self._traced
        if running is None or running.patch is not self:
            return checkpoint(layer, *args, **kwargs)
        has_run = False

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            if has_run and get_patch(self.model) is not self:
                raise RuntimeError(
                    "gradient checkpointing: expected the backward before sinkattn.disable(model), as layers run again "
                    "in it"
                )
            previous = self._set_running(replace(running, is_rerun=True) if has_run else running)
            has_run = True
            try:
                return layer(*args, **kwargs)
            finally:
                self._set_running(previous)

        return checkpoint(run, *args, **kwargs)

    def _decode_step(
        self, padding: Padding | None, cache: SinkCache
    ) -> Callable[[RunningForward, dict[str, Any]], Any] | None:
        """What runs a decode step of streams that have memory; None if nothing but the decoder does."""
        is_captured = self._step_graphs is not None and cache.graph_key is not None
        if is_captured and not torch.compiler.is_dynamo_compiling():
            return self._step_graphs
        # On a GPU there may be padding in any step, as the mask is not read; on a CPU it would take another graph.
        is_compiled = self._compiled_step is not None and (padding is None or padding.num_new.is_cuda)
        return self._plain_step if is_compiled else None

    def _set_running(self, running: RunningForward | None) -> RunningForward | None:
        """Set the running forward; returns the previous one."""
        if torch.compiler.is_dynamo_compiling():
            previous, self._traced = self._traced, running
        else:
            previous = _running.get()
            _running.set(running)
        return previous

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        dropout: float = 0.0,
        **options: Any,
    ) -> Tensor:
        """Attention of one layer over its ring, in the forward that runs; see `attend_over_ring`."""
        if dropout:
            raise RuntimeError(
                f"dropout: expected 0 in attention, got {dropout}; set attention_dropout of the configuration to 0 "
                "before sinkattn.enable, or call model.eval()"
            )
        # Compiled code sets only `_traced`; eager code after a graph break finds `_running` empty and reads it too.
        running = self._traced if torch.compiler.is_dynamo_compiling() else _running.get() or self._traced
        if running is None or running.patch is not self:
            raise RuntimeError(
                "attention modules of an enabled model run only as part of the model; if they did, the forward of its "
                "decoder was replaced after sinkattn.enable(model): call sinkattn.disable(model), then enable it again"
            )
        info, group = self.probe_result.layers[module], self.groups[module]
        return attend_over_ring(running, info, group, query, key, value, scale=scale, backend=self.backend, **options)


def _padding(attention_mask: Tensor | None, cache: SinkCache, num_tokens: int) -> Padding | None:
    """Padding among the new tokens, at any columns; None without padding."""
    if cache.has_states and attention_mask is not None and not can_read_on_host(attention_mask, num_tokens):
        return None  # models with states refuse padding where the mask can be read, so a single token is real
    token_mask = new_token_mask(attention_mask, cache, num_tokens)
    if token_mask is None:
        return None
    cache.check_padding(token_mask)
    order = None if num_tokens == 1 else (~token_mask).to(torch.int8).argsort(dim=1, stable=True)
    return Padding(token_mask.sum(dim=1), token_mask, order)
