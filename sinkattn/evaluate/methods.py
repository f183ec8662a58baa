"""Ways to run a model over a stream: sinks and a window, dense attention, recomputation; all fed the same tokens.

Every way has its own twin of the model, which shares the weights, so that all run side by side over one reading of the
text and the model itself is never changed.
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
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from sinkattn.hf import SinkCache, enable
from sinkattn.hf.model_config import trained_length
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.reencode.patch import ReencodePatch
from sinkattn.hf.stream import keep_last_logits
from sinkattn.hf.versions import forward_cache

# Tokens fed at once: bounds the memory that their logits take.
CHUNK = 256
# Tokens in the forwards of one batch of recomputations.
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class CacheSize:
    """Sinks and window, both in tokens, written ``S+W``."""

    num_sinks: int
    window: int

    @classmethod
    def parse(cls, text: str) -> CacheSize:
        """From ``S+W``; raises ValueError for any other text."""
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
    """What a model made of the next tokens."""

    losses: Tensor
    """Nats, fp64 ``[tokens]`` on the CPU; NaN where no prediction was made."""
    hits: Tensor
    """Whether the token was the likeliest of all, bool ``[tokens]`` on the CPU."""


class Predictor(Protocol):
    """Whoever reads one stream and predicts its tokens."""

    name: str

    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """Take ``ids`` in and predict the token after each.

        Args:
            ids: the next tokens of the stream, int64 ``[tokens]`` on the CPU.
            targets: the token after each of them.
            wanted: bool ``[tokens]``, the predictions that are needed; others are made if they cost nothing.
        """

    def reset(self) -> None:
        """Begin a new stream."""


class Method(Predictor, Protocol):
    """A way to run a model over one stream, token by token too."""

    model: PreTrainedModel

    @property
    def kv_bytes(self) -> int | None:
        """Bytes of keys and values that it keeps; None if it keeps none."""

    def step(self, token: int) -> None:
        """Take one token in, predict the next and wait for the device: what there is to time.

        The token need not stay in the stream.
        """


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules of a model that shares its parameters and buffers.

    Every method runs one, so that none sees what another leaves in a module, such as frequencies for a longer stream.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Cached:
    """What methods with a cache have in common."""

    model: PreTrainedModel
    cache: Any

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; makes all predictions."""
        scores = [
            _scores(self._forward(fed).logits[0], following)
            for fed, following in zip(ids.split(CHUNK), targets.split(CHUNK), strict=True)
        ]
        return Scores(*(torch.cat(each) for each in zip(*scores, strict=True)))

    @torch.inference_mode()
    def step(self, token: int) -> None:
        """See `Method.step`."""
        self._forward(torch.tensor([token])).logits[0, -1].argmax().item()

    def _forward(self, ids: Tensor, **options: Tensor) -> Any:
        fed = ids[None].to(self.model.device)
        return self.model(input_ids=fed, **{forward_cache(self.model): self.cache}, use_cache=True, **options)


class Streamed(Cached):
    """sinkattn: the first tokens and a window of recent ones; no sinks make it window attention.

    Raises:
        ValueError: sinks and window that the model cannot take, or a model that `sinkattn.enable` refuses.
    """

    def __init__(self, model: PreTrainedModel, size: CacheSize) -> None:
        self.name = str(size)
        self.size = size
        self.model = enable(twin(model), size.num_sinks, size.window)
        self.reset()

    @property
    def kv_bytes(self) -> int:
        """Bytes that the cache keeps."""
        return self.cache.nbytes

    def reset(self) -> None:
        """See `Predictor.reset`."""
        self.cache = SinkCache(self.model)


def dense_limit(streamed: Streamed) -> int | None:
    """Tokens that dense attention can take with the positions that the model has; None if they never run out."""
    absolute = isinstance(get_patch(streamed.model), ReencodePatch)
    return trained_length(streamed.model) if absolute else None


class Dense(Cached):
    """The model as transformers has it: every token sees all before it, and the cache grows."""

    name = "dense"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = twin(model)
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
        """See `Method.step`; takes the token back, so that what is timed is always a cache of the same length."""
        super().step(token)
        for layer in self.cache.layers:
            if type(layer) is DynamicLayer:
                layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
        self._seen -= 1

    def _forward(self, ids: Tensor) -> Any:
        options = {}
        if self._takes_positions:
            # Some models count from 0 in every call that does not say.
            options["position_ids"] = torch.arange(self._seen, self._seen + len(ids), device=self.model.device)[None]
        self._seen += len(ids)
        return super()._forward(ids, **options)


class Recomputed:
    """Sliding window with recomputation: a fresh forward over the last tokens for every prediction.

    Args:
        model: the model.
        size: tokens in a forward.
        start_token: stands in the place of the first of them once the stream is longer; None for none.
    """

    kv_bytes = None

    def __init__(self, model: PreTrainedModel, size: int, start_token: int | None) -> None:
        self.name = f"recomputed {size}"
        self.size = size
        self.model = twin(model)
        # A forward over one token is over the last one.
        self._start = [] if start_token is None or size == 1 else [start_token]
        self._options = {"use_cache": False, **keep_last_logits(model)}
        self.reset()

    def reset(self) -> None:
        """See `Predictor.reset`."""
        self._recent = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; makes the wanted predictions alone."""
        losses = torch.full(ids.shape, torch.nan, dtype=torch.float64)
        hits = torch.zeros(ids.shape, dtype=torch.bool)
        known = torch.cat((self._recent, ids))
        ends = wanted.nonzero()[:, 0] + len(self._recent) + 1
        # Until the stream is as long as a forward, each has a length of its own.
        batches = [*ends[ends < self.size].split(1), *ends[ends >= self.size].split(max(1, BATCH_TOKENS // self.size))]
        for batch in batches:
            if not len(batch):
                continue  # split gives one empty part of nothing
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
    """Every stretch that is fed stands alone: dense attention over a first token and this stretch.

    Args:
        model: the model.
        first_token: stands before each stretch.
        limit: tokens that the model can take at once; None if there is no such limit.
    """

    name = "one-shot"

    def __init__(self, model: PreTrainedModel, first_token: int, limit: int | None = None) -> None:
        self.model = twin(model)
        self._first = torch.tensor([first_token])
        self._limit = limit

    def reset(self) -> None:
        """See `Predictor.reset`; nothing is kept."""

    @torch.inference_mode()
    def feed(self, ids: Tensor, targets: Tensor, wanted: Tensor) -> Scores:
        """See `Predictor.feed`; the first of ``ids`` belongs to what came before. ValueError beyond the limit."""
        if self._limit is not None and len(ids) > self._limit:
            most = f"{self._limit} tokens, the positions of this model"
            raise ValueError(f"questions: expected at most {most}, got {len(ids)}")
        fed = torch.cat((self._first, ids[1:]))
        return _scores(self.model(input_ids=fed[None].to(self.model.device), use_cache=False).logits[0], targets)


def _scores(logits: Tensor, targets: Tensor) -> Scores:
    targets = targets.to(logits.device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    if not losses.isfinite().all():
        raise ValueError("loss: the model gave one that is not finite; in half precision, try --dtype float32")
    return Scores(losses.double().cpu(), (logits.argmax(dim=-1) == targets).cpu())
