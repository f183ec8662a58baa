"""What every enabled model has, however it streams: attributes of its own, and checks of what it is called with."""

from __future__ import annotations

import inspect
import uuid
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkattn.hf.cache import SinkCache, Streams
from sinkattn.hf.generation import generate
from sinkattn.hf.probe import UnsupportedModelError
from sinkattn.ops import RingLayout


class Enabled:
    """What `enable` leaves on a model. A subclass has the `forward` that takes the place of the decoder's own."""

    cache_class: type[SinkCache] = SinkCache

    def __init__(self, model: PreTrainedModel, decoder: PreTrainedModel, layout: RingLayout) -> None:
        self.id = uuid.uuid4().hex
        self.model = model
        self.decoder = decoder
        self.layout = layout
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self._own: list[tuple[nn.Module, str, Any]] = []

    def install(self) -> None:
        """Put everything in place."""
        self.put(self.model, "_sinkattn", self)
        if hasattr(type(self.model), "generate"):
            self.put(self.model, "generate", partial(generate, self.model))
        self.put(self.decoder, "forward", self.forward)

    def remove(self) -> None:
        """Restore the model, however far `install` came."""
        while self._own:
            module, name, before = self._own.pop()
            if before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = before

    def put(self, module: nn.Module, name: str, value: Any) -> None:
        """Give a module an attribute until `remove`."""
        self._own.append((module, name, module.__dict__.get(name)))
        module.__dict__[name] = value

    def cache_layers(self, streams: Streams) -> list[Any]:
        """Layers of a new cache."""
        raise NotImplementedError

    def forward(self, *args, **kwargs) -> Any:
        """Forward of the decoder while the model is enabled."""
        raise NotImplementedError

    def run(self, **kwargs) -> Any:
        """Run the decoder's own forward."""
        before = next(own for module, name, own in self._own if module is self.decoder and name == "forward")
        return (before or partial(type(self.decoder).forward, self.decoder))(**kwargs)

    def by_name(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the decoder's forward, all by name."""
        return {**dict(zip(self.parameters, args, strict=False)), **kwargs}

    def stream_of(self, kwargs: dict[str, Any], batch: int, tokens: int) -> SinkCache:
        """Cache that a call goes on with, or a new one; raises if the call cannot be taken."""
        if tokens == 0:
            raise ValueError(
                "input_ids: expected at least one token that the cache has not seen; generate takes the whole sequence "
                "so far, sinkattn.hf.stream_tokens the new tokens alone"
            )
        if self.decoder.training:
            raise RuntimeError("model: is in training mode; sinkattn is for inference, call model.eval()")
        if kwargs.get("output_attentions") or self.decoder.config.output_attentions:
            raise ValueError("output_attentions: attention weights are never formed by sinkattn, got True")
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = SinkCache(self.model)
        elif not isinstance(cache, SinkCache):
            raise TypeError(f"past_key_values: expected a sinkattn.SinkCache or None, got {type(cache).__name__}")
        elif cache.swap_id != self.id:
            raise ValueError("past_key_values: this SinkCache was made for another model or before the last enable()")
        mask, shapes = kwargs.get("attention_mask"), ((batch, tokens), (batch, cache.tokens_seen + tokens))
        if mask is not None and not (isinstance(mask, Tensor) and tuple(mask.shape) in shapes):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask: expected {list(shapes[1])}, or None, got {got}")
        return cache


def readable(x: Tensor, tokens: int) -> bool:
    """Whether to read a tensor: that would stop a GPU at every step, and end a graph that is traced."""
    return tokens > 1 or (x.is_cpu and not torch.compiler.is_dynamo_compiling())


def check_positions(position_ids: Any, positions: Tensor, present: Tensor | None = None) -> None:
    """Refuse positions that are not ``positions``, ``[1 or batch, tokens]``, where tokens are ``present``."""
    if position_ids is None:
        return
    tokens = positions.shape[1]
    if position_ids.ndim > 2 or position_ids.shape[-1] != tokens:
        raise ValueError(f"position_ids: expected [batch, {tokens}], or None, got {list(position_ids.shape)}")
    if not readable(position_ids, tokens):
        return
    wrong = position_ids != positions
    if present is not None:
        wrong = wrong & present
    if wrong.any():
        raise ValueError(
            f"position_ids: expected those of the stream, from {positions[:, 0].tolist()} on, or None; a stream has no "
            "gaps"
        )


def sample_ids(model: PreTrainedModel, tokens: int) -> Tensor:
    """Ids for a trial: int64 ``[2, tokens]``."""
    weight = model.get_input_embeddings().weight
    # Spread over the vocabulary; the two rows differ so that rows cannot be mixed up unseen.
    return ((torch.arange(2 * tokens, device=weight.device) * 7919 + 13) % weight.shape[0]).view(2, tokens)


def check_equal(model: PreTrainedModel, before: Tensor, after: Tensor) -> None:
    """Refuse a model whose outputs ``[batch, tokens, vocabulary]`` are not what they were."""
    before, after = before.double(), after.double()
    spread = (before - before.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    error = float((after - before).square().mean().sqrt() / spread)
    # Far above rounding through a whole model, far below what a wrong mask or position does.
    budget = max(1e-3, 8 * torch.finfo(model.dtype).eps)
    if not error <= budget:
        raise UnsupportedModelError(
            f"{type(model).__name__}: on a short input the swapped model differs from the original by {error:.1e} "
            f"of the spread of its outputs (allowed: {budget:.1e})"
        )
