"""Swapping sinkattn into the attention of a loaded transformers model, and out again.

Only transformers' own extension points are used: an attention function, a mask function, a cache, and hooks on this
one model. No forward is copied and no class is touched.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sinkattn import ops
from sinkattn.hf.cache import SinkCache, find_swap
from sinkattn.hf.probe import (
    PROBE_TOKENS,
    Findings,
    UnsupportedModelError,
    evaluation_mode,
    no_mask,
    no_rotation,
    probe,
    trained_length,
)

NAME = "sinkattn"
_ids = itertools.count(1)


def enable(
    model: PreTrainedModel,
    num_sinks: int = 4,
    window: int = 1020,
    headroom: int = 0,
    *,
    backend: ops.Backend = "auto",
) -> PreTrainedModel:
    """Make a loaded transformers model run on endless streams with constant memory and time per token, in place.

    Every token sees the first ``num_sinks`` tokens and the ``window`` most recent ones, itself included, at positions
    relative to the cache. Inputs up to ``num_sinks + window`` tokens give what the model gave before. The model is
    probed and compared with itself on a short input first; what cannot be proven is refused.

    Args:
        model: a causal language model of transformers, in any float dtype, on one device.
        num_sinks: tokens at the start of a stream that stay visible for ever.
        window: most recent tokens a query sees, itself included.
        headroom: spare slots; so many tokens can be taken back (assisted decoding).
        backend: ``"auto"``, ``"cpu"`` or ``"reference"``; the environment variable SINKATTN_BACKEND overrides.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: the model does something that is not supported; it is left as it was.
        TypeError, ValueError: an argument, or a model that is enabled already.
        RuntimeError: a backend that cannot run on the model's device.
    """
    layout = ops.RingLayout(num_sinks, window, headroom)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if find_swap(model) is not None:
        raise ValueError("model: is enabled already; call sinkattn.disable(model) first")
    _check_model(model, layout)
    swap = Swap(model, layout, backend, probe(model))
    swap.check_layers()
    with evaluation_mode(model):
        ids = _sample_ids(model, min(PROBE_TOKENS, num_sinks + window))
        before = model(input_ids=ids, use_cache=False)[0]
        swap.install()
        try:
            after = model(input_ids=ids, use_cache=False)[0]
            _check_equal(model, before, after)
        except BaseException:
            swap.remove()
            raise
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`, exactly. Returns the same model; raises ValueError if it is not enabled."""
    swap = find_swap(model)
    if swap is None:
        raise ValueError("model: expected a model prepared by sinkattn.enable(model), got one that is not enabled")
    swap.remove()
    return model


class Swap:
    """What `enable` leaves on a model: its layout, its rotary embeddings, and the hooks that put them to use."""

    def __init__(
        self, model: PreTrainedModel, layout: ops.RingLayout, backend: ops.Backend, findings: Findings
    ) -> None:
        self.id = next(_ids)
        self.model = model
        self.layout = layout
        self.backend = ops.select_backend(model.device, backend)
        self.findings = findings
        self.num_layers = len(findings.ropes)
        self.parameters = list(inspect.signature(findings.decoder.forward).parameters)
        self._previous_implementation = model.config._attn_implementation
        self._handles: list[Any] = []
        self._cache: SinkCache | None = None
        self._thread: int | None = None
        self._calls = 0

    def check_layers(self) -> None:
        """Refuse what the probe explained but the ring does not do."""
        name = type(self.model).__name__
        needed = {"past_key_values", "position_ids", "attention_mask"}
        if missing := needed - set(self.parameters):
            raise UnsupportedModelError(f"{name}: its decoder takes no {', '.join(sorted(missing))}")
        seen_tokens = self.layout.num_sinks + self.layout.window
        for module in self.findings.ropes:
            native = self.findings.sliding_windows.get(module)
            if native is not None and seen_tokens > native:
                raise UnsupportedModelError(
                    f"{name}: layer {module.layer_idx} has a sliding window of {native} tokens of its own; "
                    f"num_sinks + window must not exceed it, got {seen_tokens}"
                )

    def install(self) -> None:
        """Put the swap in place."""
        decoder, rotary = self.findings.decoder, self.findings.rotary
        for module in {self.model, *self.findings.ropes}:
            module._sinkattn = self
        if hasattr(type(self.model), "generate"):
            self.model.generate = types.MethodType(_generate, self.model)
        self._handles = [
            rotary.register_forward_hook(no_rotation),
            decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            decoder.register_forward_hook(self.after_forward, always_call=True),
        ]
        self.model.set_attn_implementation(NAME)

    def remove(self) -> None:
        """Restore the model."""
        self.model.set_attn_implementation(self._previous_implementation)
        for handle in self._handles:
            handle.remove()
        self.model.__dict__.pop("generate", None)
        for module in {self.model, *self.findings.ropes}:
            module.__dict__.pop("_sinkattn", None)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Check the arguments of the decoder; give it a cache, positions relative to the cache, and no mask."""
        kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if self._thread not in (None, threading.get_ident()) and any(
            thread.ident == self._thread for thread in threading.enumerate()
        ):
            raise RuntimeError("an enabled model runs one forward at a time; another thread is in the middle of one")
        if self._cache is not None:  # Ctrl-C leaves a forward without running hooks
            self._abandon()
        if kwargs.get("output_attentions") or self.findings.decoder.config.output_attentions:
            raise ValueError("output_attentions: attention weights are never formed by sinkattn, got True")
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        batch, tokens = inputs.shape[:2]
        _check_mask(kwargs.get("attention_mask"), tokens)

        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = SinkCache(self.model)
        elif not isinstance(cache, SinkCache):
            raise TypeError(f"past_key_values: expected a sinkattn.SinkCache or None, got {type(cache).__name__}")
        elif cache.swap_id != self.id:
            raise ValueError("past_key_values: this SinkCache was made for another model or before the last enable()")
        cache.begin(batch, tokens)
        self._cache, self._thread, self._calls = cache, threading.get_ident(), 0

        # The rotary module is a no-op now; whatever else goes by position sees the position within the cache.
        last = self.layout.num_sinks + self.layout.window - 1
        positions = torch.arange(cache.tokens_seen, cache.tokens_seen + tokens, device=inputs.device)
        kwargs.update(past_key_values=cache, attention_mask=None, position_ids=positions.clamp(max=last).unsqueeze(0))
        return (), kwargs

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Advance the cache if the forward went through."""
        if self._cache is None or self._thread != threading.get_ident():  # refused before it began
            return
        if output is None:  # the forward raised
            self._abandon()
            return
        cache, self._cache, self._thread = self._cache, None, None
        if self._calls != self.num_layers:
            raise RuntimeError(f"expected {self.num_layers} attention layers to run, got {self._calls}")
        cache.finish()

    def _abandon(self) -> None:
        self._cache.abandon(written=self._calls > 0)
        self._cache = self._thread = None

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float, **options) -> Tensor:
        """Attention of one layer over its ring."""
        if self._cache is None:
            raise RuntimeError("attention modules of an enabled model run only as part of the model")
        self._calls += 1
        cache, rope = self._cache, self.findings.ropes[module]
        ring = cache.layers[module.layer_idx].ring
        cos, sin = (None, None) if rope is None else cache.tables(rope)
        return ops.sink_attention_(
            ring.keys,
            ring.values,
            query,
            key,
            value,
            ring.seen,
            cos,
            sin,
            num_sinks=self.layout.num_sinks,
            window=self.layout.window,
            scale=scale,
            interleaved=rope is not None and rope.interleaved,
            backend=self.backend,
            **options,
        )


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
    swap = module.__dict__.get("_sinkattn")
    if swap is None:
        raise RuntimeError(f"attn_implementation {NAME!r} is set by sinkattn.enable(model), not by hand")
    if dropout:
        raise RuntimeError(f"dropout: sinkattn is for inference, call model.eval(); got {dropout}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = swap.attend(module, query, key, value, scale, softcap=softcap, sink_logits=s_aux)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention_forward)
AttentionMaskInterface.register(NAME, no_mask)


def _generate(self: PreTrainedModel, *args, **kwargs):
    """`generate` of an enabled model: as its class has it, with a `SinkCache` unless one is passed."""
    if kwargs.get("use_cache") is False:
        raise ValueError("use_cache: an enabled model generates from its SinkCache, got False")
    if kwargs.get("past_key_values") is None:
        kwargs["past_key_values"] = SinkCache(self)
    # A saved configuration may say otherwise; then every step would bring all tokens anew.
    kwargs["use_cache"] = True
    return type(self).generate(self, *args, **kwargs)


def _check_model(model: PreTrainedModel, layout: ops.RingLayout) -> None:
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not supported")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) != 1 or "meta" in devices:
        raise UnsupportedModelError(f"{name}: expected all parameters on one device, loaded, got {sorted(devices)}")
    trained = trained_length(model)
    if trained is not None and layout.num_sinks + layout.window > trained:
        raise UnsupportedModelError(
            f"{name}: num_sinks + window must not exceed the {trained} positions it was trained for, "
            f"got {layout.num_sinks + layout.window}"
        )


def _check_mask(attention_mask: Any, tokens: int) -> None:
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask: expected [batch, length] or None, got {got}")
    if not attention_mask[:, -tokens:].all():
        raise ValueError(
            "attention_mask: padding is not supported yet, expected ones; run rows of equal length, or one by one"
        )


def _sample_ids(model: PreTrainedModel, tokens: int) -> Tensor:
    weight = model.get_input_embeddings().weight
    # Spread over the vocabulary; the two rows differ so that rows cannot be mixed up unseen.
    return ((torch.arange(2 * tokens, device=weight.device) * 7919 + 13) % weight.shape[0]).view(2, tokens)


def _check_equal(model: PreTrainedModel, before: Tensor, after: Tensor) -> None:
    before, after = before.double(), after.double()
    spread = (before - before.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    error = float((after - before).square().mean().sqrt() / spread)
    # Far above rounding through a whole model, far below what a wrong mask or position does.
    budget = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    if not error <= budget:
        raise UnsupportedModelError(
            f"{type(model).__name__}: on a short input the swapped model differs from the original by {error:.1e} "
            f"of the spread of its outputs (allowed: {budget:.1e})"
        )
