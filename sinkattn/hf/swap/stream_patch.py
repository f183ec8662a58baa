"""`StreamPatch`: the part of the patch that all enabled models share, with the checks of every call's arguments."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.argument_checks import check_whole
from sinkattn.hf.cache.sink_cache import SinkCache, check_cache
from sinkattn.hf.generation.generate import generate
from sinkattn.hf.inputs import has_only_ids
from sinkattn.hf.model_config import trained_length
from sinkattn.hf.model_patch import ModelPatch
from sinkattn.hf.versions import CACHE_NAMES, forward_cache, take_cache
from sinkattn.ops import RingLayout

# Arguments whose default the model reads from its own configuration and the decoder from its copy.
CONFIG_FLAGS = ("output_hidden_states", "return_dict")


class StreamPatch(ModelPatch):
    """A `ModelPatch` that replaces `generate`, checks the arguments of calls and provides their cache."""

    cache_class = SinkCache

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, layout: RingLayout) -> None:
        super().__init__(model, decoder, layout)
        # The original: a subclass may give the decoder a copy, as other models may share this one.
        self.config = decoder.config
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.cache_argument = forward_cache(decoder)
        self.model_cache_argument = forward_cache(model)

    def layout_with(self, num_sinks: int) -> RingLayout:
        """Layout of a cache with another number of sinks; raises ValueError for one that the model does not take."""
        check_whole("num_sinks", num_sinks, None)
        most = self.max_visible()
        if num_sinks < 0 or (most is not None and num_sinks + self.layout.window > most):
            limit = "" if most is None else f" to {most - self.layout.window}, as the model sees at most {most} tokens"
            raise ValueError(f"num_sinks: expected 0{limit or ' or more'}, got {num_sinks}")
        return RingLayout(num_sinks, self.layout.window, self.layout.headroom)

    def max_visible(self) -> int | None:
        """The most tokens, sinks and window, that a token may see; None without a limit."""
        return trained_length(self.model)

    def install(self) -> None:
        """Patch the model."""
        super().install()
        if hasattr(type(self.model), "generate"):
            self.set_attribute(self.model, "generate", partial(generate, self.model))
        if self.model is not self.decoder:
            self._hooks.append(self.model.register_forward_pre_hook(_model_pre_hook, with_kwargs=True))

    def named_arguments(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call of the decoder's forward, positional ones by name too."""
        named = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        if named.get("use_cache") is None and "use_cache" in self.parameters:
            # From the model's configuration, which a Trainer changes; the decoder may read a copy.
            named["use_cache"] = self.config.use_cache
        return named

    def checked_cache(self, kwargs: dict[str, Any], batch: int, num_tokens: int) -> SinkCache:
        """Check the arguments of a call; take its cache out of ``kwargs``, or make one."""
        if num_tokens == 0:
            raise ValueError(
                "input_ids: expected at least one token that the cache has not seen, got none; generate takes the "
                "whole sequence so far, sinkattn.hf.stream_tokens only the new tokens"
            )
        if kwargs.get("output_attentions") or self.config.output_attentions or self.decoder.config.output_attentions:
            raise ValueError("output_attentions: expected False, got True; sinkattn never forms attention weights")
        for name in CONFIG_FLAGS:
            if getattr(self.config, name, None) != getattr(self.decoder.config, name, None):
                raise ValueError(
                    f"{name}: was changed in the model's configuration after sinkattn.enable, which its decoder does "
                    "not read; change it before, or pass it to each call"
                )
        name, cache = take_cache(kwargs)
        check_cache(self, name, cache)
        if cache is None:
            cache = SinkCache(self.model)
        cache.apply_pending_update()
        mask = kwargs.get("attention_mask")
        # Of the new tokens, of the whole stream, or of the part of it that generate counts.
        widths = tuple(past + num_tokens for past in (0, cache.tokens_seen, cache.get_seq_length()))
        if mask is not None and not (isinstance(mask, Tensor) and any(mask.shape == (batch, n) for n in widths)):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected {[batch, widths[1]]}, or None, got {got}")
        return cache

    def check_no_checkpointing(self) -> None:
        """Raise RuntimeError if layers are set to gradient checkpointing, which has an effect in training mode."""
        if any(getattr(module, "gradient_checkpointing", False) for module in self.decoder.modules()):
            raise RuntimeError(
                f"{type(self.model).__name__}: gradient checkpointing runs layers again, outside of a forward of the "
                "model; call model.gradient_checkpointing_disable()"
            )


def _model_pre_hook(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of an enabled model: check the cache, record the ids, and rename the cache argument.

    The model's class may silently ignore a cache under the other name. The decoder may be given embeddings, so the
    ids that the model is given are recorded here.
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
