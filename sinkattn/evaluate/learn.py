"""Learning along a stream: learners and the frozen model over the same tokens, and what the learners forget.

A position is the index in the stream of the token that is predicted. Losses are prequential: a token is predicted
before it is learned from. That is checked at the first chunk of every stretch: a learner must report the loss that it
reports when it does not learn.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import Cached, CacheSize, Streamed, copy_sharing_weights
from sinkattn.evaluate.speed import Speed
from sinkattn.evaluate.statistics import Blocks, Mean
from sinkattn.evaluate.variant import DECAY, FROZEN, Variant
from sinkattn.hf import OnlineLearner, SinkCache, enable
from sinkattn.hf.learner import HALF_DTYPES

# A chunk that is learned from takes so many times as long as one that is only read, about.
LEARNING_COST = 3.0
# Stretches that are kept; beyond them neighbours are joined.
MAX_STRETCHES = 32
# Blocks of the interval of a difference: as few as give an interval.
DIFFERENCE_BLOCKS = 8
# A mean loss with and without gradients differs by less, relatively: in fp32, and in half precision.
TOLERANCE, HALF_TOLERANCE = 1e-4, 1e-3


@dataclass(frozen=True)
class Settings:
    """What learns, and sizes in tokens."""

    cache: CacheSize
    variants: tuple[Variant, ...]
    tokens: int | None
    """Length of the stream; None for all that there is."""
    stretch: int
    """Length of a stretch, a multiple of the chunk; the last one may be shorter."""
    chunk: int = 256
    held_out: int = 0
    """Tokens of each text that are kept from the stream."""
    seed: int = 0
    """Of the first weights of adapters."""

    def seconds(self, speed: Speed, texts: int = 1) -> float:
        """About how long `run` takes; ``texts`` are held out."""
        assert self.tokens is not None
        chunks = math.ceil(self.tokens / self.chunk)
        reading = self.tokens * speed.token + chunks * speed.step
        reencoding = chunks * (self.cache.total * speed.token + speed.step)
        learning = sum(LEARNING_COST * reading + each.reencode * reencoding for each in self.variants)
        checks = math.ceil(self.tokens / self.stretch) * texts * self.held_out * len(self.variants) * speed.token
        return reading + learning + checks

    def check(self) -> None:
        """Raise ValueError for stretches that do not end with a chunk, and for a variant that is there twice."""
        if self.stretch % self.chunk:
            raise ValueError(f"stretch: expected a multiple of the chunk ({self.chunk}), got {self.stretch}")
        if len(set(map(str, self.variants))) < len(self.variants):
            raise ValueError(f"variants: expected each once, got {' '.join(map(str, self.variants))}")


@dataclass
class Stretch:
    """The measurements of one stretch: positions begin .. end - 1, by method."""

    begin: int
    end: int
    losses: dict[str, Blocks]
    held_out: dict[str, dict[str, Blocks]] = field(default_factory=dict)
    """Losses of each text that is held out, by text and learner, at the end of the stretch; empty if it was cut off."""


@dataclass
class Result:
    """The measurements so far."""

    settings: Settings
    learners: dict[str, OnlineLearner]
    held_out: dict[str, Blocks] = field(default_factory=dict)
    """Losses of the frozen model on the texts that are held out."""
    stretches: list[Stretch] = field(default_factory=list)
    timed: int = 0
    """Tokens that were timed: all but the first chunks of stretches, which are checked."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Their time, by method."""

    @property
    def tokens(self) -> int:
        """Tokens of the stream so far."""
        return self.stretches[-1].end if self.stretches else 0

    def mean(self, method: str) -> Mean | None:
        """Mean loss of a method over the whole stream."""
        return self._losses(method).mean()

    def minus_frozen(self, method: str) -> Mean | None:
        """Mean loss of a method minus that of the frozen model over the whole stream, paired by block."""
        return minus_frozen(self._losses(method), self._losses(FROZEN))

    def _losses(self, method: str) -> Blocks:
        return Blocks.join([each.losses[method] for each in self.stretches])


def minus_frozen(learner: Blocks, frozen: Blocks) -> Mean | None:
    """Mean loss of a learner minus that of the frozen model, paired by block.

    What a learner gains changes slowly along a stream, so that means over short blocks would be correlated.
    """
    one, other = (Blocks.join([each], DIFFERENCE_BLOCKS) for each in (learner, frozen))
    return one.difference(other)


def _losses_of(method: Cached, ids: Tensor) -> np.ndarray:
    """Losses of all ids ``[tokens]`` but the first, which a method reads next."""
    return method.feed(ids[:-1], ids[1:], torch.ones(len(ids) - 1, dtype=torch.bool)).losses.numpy()


class _Reader(Cached):
    """Reads with the present weights of an enabled model, on a cache of its own, and learns nothing."""

    def __init__(self, model: PreTrainedModel, cache: SinkCache) -> None:
        self.model = model
        self.cache = cache


class _Frozen:
    """The frozen model, by the code of the other evaluations."""

    def __init__(self, model: PreTrainedModel, size: CacheSize) -> None:
        self._method = Streamed(model, size)
        self._last = torch.empty(0, dtype=torch.int64)

    @property
    def model(self) -> PreTrainedModel:
        return self._method.model

    def step(self, piece: Tensor) -> float:
        """As `OnlineLearner.step`."""
        ids = torch.cat((self._last, piece))
        self._last = piece[-1:]
        return float(_losses_of(self._method, ids).mean())


def run(
    model: PreTrainedModel,
    ids: Iterator[int],
    settings: Settings,
    held_out: dict[str, Tensor],
    on_progress: Callable[[Result], None],
    on_stretch: Callable[[Result], None],
) -> Result:
    """Let learners and the frozen model read a stream, chunk by chunk in turn.

    Args:
        model: a transformers causal language model that `sinkattn.enable` and `OnlineLearner` accept, in evaluation
            mode. Its weights are not changed; adapters share them, so afterwards they require no gradients.
        ids: the tokens.
        settings: what learns, and sizes.
        held_out: ids ``[tokens]`` of texts that are not learned from, by name; scored at the end of every stretch.
        on_progress: called after every chunk.
        on_stretch: called after every stretch.

    Raises:
        ValueError: for invalid settings, a model or window that is refused, a stream of fewer than two tokens, or a
            loss that is not finite.
        ImportError: for adapters without peft.
        RuntimeError: if a token was scored by weights that had seen it.
        Interrupted: if it is raised in the first chunk. Later it only ends the run early.
    """
    settings.check()
    frozen = _Frozen(model, settings.cache)
    learners = {str(each): _learner(model, each, settings) for each in settings.variants}
    methods: dict[str, _Frozen | OnlineLearner] = {FROZEN: frozen, **learners}
    result = Result(settings, learners, seconds=dict.fromkeys(methods, 0.0))
    done, length = 0, settings.stretch

    def end_stretch() -> None:
        after = {name: _held_out_losses(learner.model, held_out) for name, learner in learners.items()}
        result.stretches[-1].held_out = after
        on_stretch(result)

    try:
        result.held_out = _held_out_losses(frozen.model, held_out)
        while piece := list(islice(ids, _left(settings, done))):
            if len(piece) + done < 2:
                break
            chunk, stretch = torch.tensor(piece), result.stretches[-1] if result.stretches else None
            is_first = stretch is None or stretch.end == stretch.begin + length
            if stretch is None or is_first:
                end = min(done + length, settings.tokens or math.inf)
                stretch = Stretch(done, done, {name: Blocks(done, int(end), settings.chunk) for name in methods})
            losses, seconds = {}, {}
            for name, method in methods.items():
                began = time.perf_counter()
                if is_first and isinstance(method, OnlineLearner):
                    losses[name] = _checked_step(method, chunk)
                else:
                    losses[name] = method.step(chunk)
                if method.model.device.type != "cpu":
                    torch.accelerator.synchronize()  # for the optimizer to be done
                seconds[name] = time.perf_counter() - began
            # A chunk counts when all have read it.
            scored = len(piece) - (done == 0)
            for name, loss in losses.items():
                if not math.isfinite(loss):
                    raise ValueError(f"{name}: the loss is not finite after {done:,} tokens; try a lower learning rate")
            for name, loss in losses.items():
                stretch.losses[name].add(done + len(piece) - scored, np.full(scored, loss))
            if is_first:
                result.stretches.append(stretch)
            else:
                result.timed += len(piece)
                for name, spent in seconds.items():
                    result.seconds[name] += spent
            done = stretch.end = done + len(piece)
            on_progress(result)
            if done == stretch.begin + length:
                end_stretch()
                if len(result.stretches) == MAX_STRETCHES:
                    result.stretches, length = _joined(result.stretches), 2 * length
        if result.stretches and not result.stretches[-1].held_out:
            end_stretch()
    except Interrupted:
        if not done:
            raise
    if not done:
        raise ValueError("text: expected two tokens or more")
    return result


def is_half(model: PreTrainedModel) -> bool:
    """Whether a model is in half precision, in which its weights cannot learn."""
    return model.dtype in HALF_DTYPES


def _left(settings: Settings, done: int) -> int:
    """Tokens of the next chunk."""
    return settings.chunk if settings.tokens is None else min(settings.chunk, settings.tokens - done)


def _learner(model: PreTrainedModel, variant: Variant, settings: Settings) -> OnlineLearner:
    """A learner on a copy of a model, which for adapters shares the weights."""
    copied = copy_sharing_weights(model) if variant.learn == "lora" else copy.deepcopy(model)
    enable(copied, settings.cache.num_sinks, settings.cache.window)
    return new_learner(copied, variant, settings.chunk, settings.seed)


def new_learner(model: PreTrainedModel, variant: Variant, chunk: int, seed: int = 0) -> OnlineLearner:
    """A learner of this variant on an enabled model; ``seed`` is of the adapters' initial weights.

    Raises ValueError for all weights in half precision, and whatever `OnlineLearner` does.
    """
    if variant.learn == "all" and is_half(model):
        raise ValueError(f"{variant}: the steps of weights in half precision get lost; give --dtype float32, or lora")
    rate = variant.rate
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return OnlineLearner(
            model,
            None if rate is None else lambda weights: torch.optim.AdamW(weights, lr=rate, weight_decay=0),
            chunk=chunk,
            learn=variant.learn,
            after_update="reencode" if variant.reencode else "keep",
            decay=DECAY if variant.decay else 0.0,
        )


def _held_out_losses(model: PreTrainedModel, held_out: dict[str, Tensor]) -> dict[str, Blocks]:
    """Losses of texts, each a new stream."""
    losses = {}
    for name, ids in held_out.items():
        losses[name] = Blocks(0, len(ids) - 1)
        losses[name].add(0, _losses_of(_Reader(model, SinkCache(model)), ids))
    return losses


def _checked_step(learner: OnlineLearner, chunk: Tensor) -> float:
    """`OnlineLearner.step`; raises RuntimeError if its loss is not that of the weights from before."""
    frozen = copy.copy(learner)
    frozen.cache = copy.deepcopy(learner.cache)
    frozen.freeze()
    expected = frozen.step(chunk)
    for x in learner.parameters.values():
        x.requires_grad = True  # the weights are the same, and were frozen too
    loss = learner.step(chunk)
    if abs(loss - expected) > expected * (HALF_TOLERANCE if is_half(learner.model) else TOLERANCE):
        raise RuntimeError(
            f"learner: expected the loss {expected:.6f} of the weights from before the chunk, got {loss:.6f}: tokens "
            "were scored after they were learned from"
        )
    return loss


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """Each two neighbours as one; held-out losses are those at its end."""
    pairs = zip(stretches[::2], stretches[1::2], strict=True)
    return [
        Stretch(
            one.begin,
            other.end,
            {name: Blocks.join([one.losses[name], other.losses[name]]) for name in one.losses},
            other.held_out,
        )
        for one, other in pairs
    ]
