"""`StreamPatch`: what is patched on every enabled model, and the checks of every call's arguments."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.cache.sink_cache import SinkCache, check_cache
from sinkattn.hf.generation.generate import generate
from sinkattn.hf.inputs import has_only_ids
from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.versions import CACHE_NAMES, cache_name, forward_cache, take_cache
from sinkattn.ops import RingLayout

# Forwards read these from the configuration when a call does not pass them.
CONFIG_FLAGS = ("output_hidden_states", "return_dict", "use_cache")


class StreamPatch(ModelPatch):
    """A `ModelPatch` with what all kinds of streaming share: `generate`, argument checks, and the cache of a call."""

    cache_class = SinkCache

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, layout: RingLayout) -> None:
        super().__init__(model, decoder, layout)
        # Other models may share the configuration, so an enabled decoder may read a copy.
        self.config = decoder.config
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.cache_argument = cache_name(self.parameters)
        self.model_cache_argument = forward_cache(model)

    def install(self) -> None:
        """Put everything in place."""
        super().install()
        if hasattr(type(self.model), "generate"):
            self.set_attribute(self.model, "generate", partial(generate, self.model))
        if self.model is not self.decoder:
            self._hooks.append(self.model.register_forward_pre_hook(_before_forward, with_kwargs=True))

    def by_name(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the decoder's forward, all by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def stream_of(self, kwargs: dict[str, Any], batch: int, tokens: int) -> SinkCache:
        """Take the cache that a call goes on with out of ``kwargs``, or make one; raises if the call is refused."""
        if tokens == 0:
            raise ValueError(
                "input_ids: expected at least one token that the cache has not seen; generate takes the whole sequence "
                "so far, sinkattn.hf.stream_tokens the new tokens alone"
            )
        if self.decoder.training:
            raise RuntimeError("model: is in training mode; sinkattn is for inference, call model.eval()")
        if kwargs.get("output_attentions") or self.config.output_attentions or self.decoder.config.output_attentions:
            raise ValueError("output_attentions: attention weights are never formed by sinkattn, got True")
        for name in CONFIG_FLAGS:
            if getattr(self.config, name, None) != getattr(self.decoder.config, name, None):
                raise ValueError(
                    f"{name}: was changed in the model's configuration while it is enabled, which its decoder does not "
                    "see; change it before sinkattn.enable, or give it to each call"
                )
        name, cache = take_cache(kwargs)
        check_cache(self, name, cache)
        if cache is None:
            cache = SinkCache(self.model)
        cache.apply_pending_update()
        mask = kwargs.get("attention_mask")
        # Of the new tokens, of all, or of those that generate knows of.
        widths = (tokens, cache.tokens_seen + tokens, cache.get_seq_length() + tokens)
        if mask is not None and not (isinstance(mask, Tensor) and any(mask.shape == (batch, n) for n in widths)):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected {[batch, widths[1]]}, or None, got {got}")
        return cache


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of an enabled model.

    Its class may ignore, in silence, a cache under the other name. And the ids that it is given are noted, for its
    decoder may get embeddings.
    """
    patch = model.__dict__["_sinkattn"]
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        check_cache(patch, name, cache)
        if cache is not None:
            ids = args[0] if args else kwargs.get("input_ids")
            cache.note_inputs(ids if isinstance(ids, Tensor) else None, only_ids=has_only_ids(kwargs))
    wanted = patch.model_cache_argument
    if not any(name in kwargs for name in CACHE_NAMES if name != wanted):
        return None
    _, cache = take_cache(kwargs)
    return args, kwargs if cache is None else {**kwargs, wanted: cache}
