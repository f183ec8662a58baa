"""What every enabled model has, however it streams: attributes of its own, and checks of what it is called with."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.cache import SinkCache
from sinkattn.hf.cache_layers import Streams
from sinkattn.hf.generation import generate
from sinkattn.hf.inputs import ids_alone
from sinkattn.hf.versions import CACHE_NAMES, cache_name, forward_cache, take_cache
from sinkattn.ops import RingLayout

# What forwards read from a configuration if a call does not say.
CONFIG_FLAGS = ("output_hidden_states", "return_dict", "use_cache")


class Enabled:
    """What `enable` leaves on a model. A subclass has the `forward` that takes the place of the decoder's own."""

    cache_class: type[SinkCache] = SinkCache

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, layout: RingLayout) -> None:
        self.id = uuid.uuid4().hex
        self.model = model
        self.decoder = decoder
        self.layout = layout
        self.config = decoder.config  # other models may share it, so the decoder may read a copy while it is enabled
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.cache_argument = cache_name(self.parameters)
        self.model_cache_argument = forward_cache(model)
        self._own: list[tuple[nn.Module, str, Any, Any]] = []
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Put everything in place."""
        for module in {self.model, self.decoder}:
            self.put(module, "_sinkattn", self)
        if hasattr(type(self.model), "generate"):
            self.put(self.model, "generate", partial(generate, self.model))
        if self.model is not self.decoder:
            self._hooks.append(self.model.register_forward_pre_hook(_before_forward, with_kwargs=True))
        self.put_forward(self.decoder, self.forward)

    def remove(self) -> None:
        """Restore the model, however far `install` came; what somebody else has put in place since stays."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._own:
            module, name, value, before = self._own.pop()
            if module.__dict__.get(name) is not value:
                continue
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Give a module an attribute until `remove`."""
        self._own.append((module, name, value, module.__dict__.get(name)))
        module.__dict__[name] = value

    def put_forward(self, module: nn.Module, forward: Callable) -> None:
        """Give a module another forward until `remove`; a wrapper around it, accelerate's say, may stay longer."""
        self.put(module, "forward", _Forward(_either, self, module, forward, module.__dict__.get("forward")))

    def cache_layers(self, streams: Streams) -> list[Any]:
        """Layers of a new cache."""
        raise NotImplementedError

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder while the model is enabled."""
        raise NotImplementedError

    def run(self, **kwargs) -> Any:
        """Run the decoder's own forward."""
        before = next(own for module, name, _, own in self._own if module is self.decoder and name == "forward")
        return _own_forward(self.decoder, before)(**kwargs)

    def by_name(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the decoder's forward, all by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def check_cache(self, name: str, cache: Any) -> None:
        """Raise if a call cannot go on with a cache, which it got under this name."""
        if cache is None:
            return
        if not isinstance(cache, SinkCache):
            raise TypeError(
                f"{name}: expected a sinkattn.SinkCache or None, got {type(cache).__name__}; if you gave none, it is "
                "from what holds the enabled model: enable the outer model instead, or give it a SinkCache; prefix "
                "tuning is not supported"
            )
        if cache.swap_id != self.id:
            raise ValueError(f"{name}: this SinkCache was made for another model or before the last enable()")

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
        self.check_cache(name, cache)
        if cache is None:
            cache = SinkCache(self.model)
        cache.carry_out_plan()
        mask = kwargs.get("attention_mask")
        # Of the new tokens, of all, or of those that generate knows of.
        widths = (tokens, cache.tokens_seen + tokens, cache.get_seq_length() + tokens)
        if mask is not None and not (isinstance(mask, Tensor) and any(mask.shape == (batch, n) for n in widths)):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected {[batch, widths[1]]}, or None, got {got}")
        return cache


def _own_forward(module: nn.Module, before: Callable | None) -> Callable:
    return before or partial(type(module).forward, module)


def _either(enabled: Enabled, module: nn.Module, forward: Callable, before: Callable | None, *args, **kwargs) -> Any:
    active = enabled.model.__dict__.get("_sinkattn") is enabled
    return (forward if active else _own_forward(module, before))(*args, **kwargs)


class _Forward(partial):
    """`_either`, with the signature of the forward that it stands for."""

    @property
    def __signature__(self) -> inspect.Signature:
        _, module, _, before = self.args
        return inspect.signature(before or type(module).forward.__get__(module))


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of an enabled model.

    Its class may ignore, in silence, a cache under the other name. And the ids that it is given are noted, for its
    decoder may get embeddings.
    """
    enabled = model.__dict__["_sinkattn"]
    for name in CACHE_NAMES:
        cache = kwargs.get(name)
        enabled.check_cache(name, cache)
        if cache is not None:
            ids = args[0] if args else kwargs.get("input_ids")
            cache.note(ids if isinstance(ids, Tensor) else None, alone=ids_alone(kwargs))
    wanted = enabled.model_cache_argument
    if not any(name in kwargs for name in CACHE_NAMES if name != wanted):
        return None
    _, cache = take_cache(kwargs)
    return args, kwargs if cache is None else {**kwargs, wanted: cache}


def sample_ids(model: PreTrainedModel, tokens: int) -> Tensor:
    """Ids for a trial: int64 ``[2, tokens]``."""
    weight = model.get_input_embeddings().weight
    # Spread over the vocabulary; the two rows differ so that rows cannot be mixed up unseen.
    return ((torch.arange(2 * tokens, device=weight.device) * 7919 + 13) % weight.shape[0]).view(2, tokens)
