"""Methods of running a model over a stream: sinks and a window, dense attention, recomputation.

Each method runs its own copy of the model's modules, which shares the weights. So all methods can be fed in step while
the text is read once, and the model itself is not changed.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sinkattn.hf import SinkCache, enable
from sinkattn.hf.model_config import trained_length
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.reencode.patch import ReencodePatch
from sinkattn.hf.stream import keep_last_logits
from sinkattn.hf.versions import forward_cache
from sinkattn.ring_cache import CacheDtype

# Tokens per forward; bounds the memory of their logits.
CHUNK_TOKENS = 256
# Tokens per batch of recomputations.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class CacheSize:
    """Number of sinks and window size, in tokens; written ``S+W``."""

    num_sinks: int
    window: int

    @classmethod
    def parse(cls, text: str) -> CacheSize:
        """Parse ``S+W``; raises ValueError for any other text."""
        if not (match := re.fullmatch(r"(\d+)\+([1-9]\d*)", text)):
            raise ValueError(f"cache: expected sinks + window, such as 4+1020, got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @property
    def total(self) -> int:
        """Tokens that a query sees."""
        return self.num_sinks + self.window

    def __str__(self) -> str:
        return f"{self.num_sinks}+{self.window}"


class Scores(NamedTuple):
    """A model's predictions of the next tokens, compared with the tokens that follow."""

    losses: Tensor
    """Losses in nats, fp64 ``[tokens]`` on the CPU; NaN where no prediction was made."""
    hits: Tensor
    """Whether the token is the argmax of the logits, bool ``[tokens]`` on the CPU."""


class Predictor(Protocol):
    """Reads one stream and predicts its tokens."""

    name: str

    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """Feed ``ids`` and predict the token after each.

        Args:
            ids: the next tokens of the stream, int64 ``[tokens]`` on the CPU.
            targets: the token after each of them.
            wanted: bool ``[tokens]``, the predictions that are needed; the others may be left out.
        """

    def reset(self) -> None:
        """Begin a new stream."""


class Method(Predictor, Protocol):
    """A predictor that keeps a cache or recent tokens, and can be timed token by token."""

    model: PreTrainedModel

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of the keys and values kept; None for a method without a KV cache."""

    def step(self, token: int) -> None:
        """Feed one token, predict the next and wait for the device. This is what is timed.

        The token may be rolled back afterwards.
        """


def copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules of a model, sharing its parameters and buffers.

    Modules can hold state, such as RoPE frequencies rescaled for a long input: with copies, methods are independent.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Cached:
    """Base of the methods with a cache."""

    model: PreTrainedModel
    cache: Cache

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; makes all predictions."""
        scores = [
            self._score(self._forward(fed).logits[0], following)
            for fed, following in zip(ids.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        ]
        return Scores(*(torch.cat(each) for each in zip(*scores, strict=True)))

    @torch.inference_mode()
    def step(self, token: int) -> None:
        """See `Method.step`."""
        self._forward(torch.tensor([token])).logits[0, -1].argmax().item()

    def _score(self, logits: Tensor, targets: Tensor) -> Scores:
        return _scores(logits, targets)

    def _forward(self, ids: Tensor, **options: Tensor) -> Any:
        fed = ids[None].to(self.model.device)
        return self.model(input_ids=fed, **{forward_cache(self.model): self.cache}, use_cache=True, **options)


class Streamed(Cached):
    """sinkattn: sinks and a window of recent tokens; with 0 sinks, window attention.

    Args:
        model: the model.
        size: sinks and window.
        compile: compile the decode step, as `sinkattn.enable` does.
        cache_dtype: hold tokens that are not sinks in 8 bits, as `sinkattn.enable` does.

    Raises:
        ValueError: if `sinkattn.enable` refuses the model, the number of sinks, the window or the cache_dtype.
    """

    cache: SinkCache

    def __init__(
        self,
        model: PreTrainedModel,
        size: CacheSize,
        *,
        compile: bool = False,
        cache_dtype: CacheDtype | None = None,
    ) -> None:
        self.name = str(size) if cache_dtype is None else f"{size} {cache_dtype}"
        self.size, self.cache_dtype = size, cache_dtype
        self.keeps_logits = False
        """Whether the logits of the last call of `feed` are kept, for a comparison."""
        self.kept_logits: list[Tensor] = []
        options: dict[str, Any] = {"compile": compile, "cache_dtype": cache_dtype}
        self.model = enable(copy_sharing_weights(model), size.num_sinks, size.window, **options)
        self.reset()

    @property
    def kv_bytes(self) -> int:
        """Size of the cache in bytes."""
        return self.cache.nbytes

    def reset(self) -> None:
        """See `Predictor.reset`."""
        self.cache = SinkCache(self.model)

    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; makes all predictions."""
        self.kept_logits = []
        return super().feed(ids, targets, wanted)

    def _score(self, logits: Tensor, targets: Tensor) -> Scores:
        if self.keeps_logits:
            self.kept_logits.append(logits)
        return super()._score(logits, targets)


def dense_limit(streamed: Streamed) -> int | None:
    """Tokens that dense attention can take, for a model with absolute positions; None if positions do not limit it."""
    absolute = isinstance(get_patch(streamed.model), ReencodePatch)
    return trained_length(streamed.model) if absolute else None


class Dense(Cached):
    """The unpatched model with a growing cache; every token sees all earlier ones."""

    name = "dense"
    cache: DynamicCache

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy_sharing_weights(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.reset()

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in the cache."""
        tensors = (getattr(layer, name, None) for layer in self.cache.layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def reset(self) -> None:
        """See `Predictor.reset`."""
        self.cache = DynamicCache(config=self.model.config)
        self._seen = 0

    def step(self, token: int) -> None:
        """See `Method.step`. The token is removed again, so that every timed step reads a cache of the same length."""
        super().step(token)
        for layer in self.cache.layers:
            if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
        self._seen -= 1

    def _forward(self, ids: Tensor, **options: Tensor) -> Any:
        if self._takes_positions:
            # Without position_ids some models count from 0 in every call.
            options["position_ids"] = torch.arange(self._seen, self._seen + len(ids), device=self.model.device)[None]
        self._seen += len(ids)
        return super()._forward(ids, **options)


class Recomputed:
    """Sliding window with recomputation: a forward without cache over the last tokens, for every prediction.

    Args:
        model: the model.
        size: tokens per forward.
        start_token: replaces the first of these tokens once the stream is longer than ``size``; None to replace none.
    """

    kv_bytes = None

    def __init__(self, model: PreTrainedModel, size: int, start_token: int | None) -> None:
        self.name = f"recomputed {size}"
        self.size = size
        self.model = copy_sharing_weights(model)
        # With a size of 1 it would replace the only token.
        self._start = [] if start_token is None or size == 1 else [start_token]
        self._options = {"use_cache": False, **keep_last_logits(model)}
        self.reset()

    def reset(self) -> None:
        """See `Predictor.reset`."""
        self._recent = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; makes only the wanted predictions."""
        losses = torch.full(ids.shape, torch.nan, dtype=torch.float64)
        hits = torch.zeros(ids.shape, dtype=torch.bool)
        known = torch.cat((self._recent, ids))
        ends = wanted.nonzero()[:, 0] + len(self._recent) + 1
        # Forwards shorter than ``size`` differ in length, so they cannot share a batch.
        batches = [*ends[ends < self.size].split(1), *ends[ends >= self.size].split(max(1, BATCH_TOKENS // self.size))]
        for batch in batches:
            if not len(batch):
                continue  # split() of an empty tensor yields one empty part
            length = min(self.size, int(batch[0]))
            rows = known[batch[:, None] + torch.arange(-length, 0)]
            if length == self.size:
                rows[:, : len(self._start)] = torch.tensor(self._start, dtype=torch.int64)
            at = batch - len(self._recent) - 1
            logits = self.model(input_ids=rows.to(self.model.device), **self._options).logits[:, -1]
            losses[at], hits[at] = _scores(logits, targets[at])
        self._recent = known[-self.size :]
        return Scores(losses, hits)

    @torch.inference_mode()
    def step(self, token: int) -> None:
        """See `Method.step`."""
        self._recent = torch.cat((self._recent, torch.tensor([token])))[-self.size :]
        self.model(input_ids=self._recent[None].to(self.model.device), **self._options).logits[0, -1].argmax().item()


class OneShot:
    """Dense attention over each call's tokens only; nothing is remembered from earlier calls.

    Args:
        model: the model.
        start_ids: replace the first token of each call, which belongs to the sequence before; at least one.
        limit: maximum tokens of a sequence; None for no limit.
    """

    name = "one-shot"

    def __init__(self, model: PreTrainedModel, start_ids: list[int], limit: int | None = None) -> None:
        self.model = copy_sharing_weights(model)
        self._start = torch.tensor(start_ids)
        self._limit = limit

    def reset(self) -> None:
        """See `Predictor.reset`; there is no state."""

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; the first of ``ids`` is replaced. Raises ValueError beyond the limit."""
        fed = torch.cat((self._start, ids[1:]))
        if self._limit is not None and len(fed) > self._limit:
            limit = f"{self._limit} tokens, the positions of this model"
            raise ValueError(f"questions: expected at most {limit}, got {len(fed)}")
        logits = self.model(input_ids=fed[None].to(self.model.device), use_cache=False).logits[0]
        return _scores(logits[len(self._start) - 1 :], targets)


def _scores(logits: Tensor, targets: Tensor) -> Scores:
    targets = targets.to(logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    if not losses.isfinite().all():
        raise ValueError("loss: the model returned one that is not finite; in half precision, try --dtype float32")
    return Scores(losses.double().cpu(), (logits.argmax(dim=-1) == targets).cpu())
