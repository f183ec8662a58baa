"""Decode steps replayed from CUDA graphs: one launch for all kernels of a step.

What changes from token to token is on the device, so a captured step is right for every later token of its cache. What
else it depends on is compared in every step: inputs and the addresses of weights and rings before it is replayed, and
attributes and hooks of modules afterwards, while the device works. A step that turns out to be out of date is run again
without its graph, and overwrites the token that the replay wrote.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.swap.captured_step import (
    CapturedStep,
    Graph,
    NotCapturableError,
    Step,
    check_capturable,
    newest_tokens,
)
from sinkattn.hf.swap.layer_attention import RunningForward

logger = logging.getLogger("sinkattn")

# Steps of a cache before one is captured, which takes as long as a few steps. Twice as many before the next attempt
# whenever one was of no use, up to MAX_STEPS_BEFORE.
STEPS_BEFORE = 3
MAX_STEPS_BEFORE = 4096
# The first replay repeats a step that has just run, with the same kernels; but a library may choose another one.
MAX_ERROR_EPS = 8


@dataclass
class CacheSteps:
    """The steps of one cache."""

    captured: CapturedStep | None = None
    num_steps: int = 0
    """Steps since the last attempt to capture one."""
    steps_before: int = STEPS_BEFORE
    """Steps before the next attempt."""
    reason: str | None = None
    """Why the last attempt failed."""

    def back_off(self) -> None:
        """Wait longer before the next attempt, unless the last graph served for long."""
        was_useful = self.captured is not None and self.num_steps > self.steps_before
        self.steps_before = STEPS_BEFORE if was_useful else min(2 * self.steps_before, MAX_STEPS_BEFORE)
        self.captured, self.num_steps = None, 0


class StepGraphs:
    """Runs the decode steps of an enabled model: the first ones of each cache as they are, then from a graph.

    Args:
        step: a decode step; takes the state of the running forward, and the arguments of the decoder by name.
        fixed_step: the same, with nothing on the host that depends on how long the stream is.
        decoder: the decoder.
        new_graph: makes a graph.
    """

    def __init__(self, step: Step, fixed_step: Step, decoder: nn.Module, new_graph: Callable[[], Graph]) -> None:
        self._arguments = step, fixed_step, decoder, new_graph
        # A graph writes to the rings of its cache, and is gone with it.
        self._steps: WeakKeyDictionary[SinkCache, CacheSteps] = WeakKeyDictionary()
        self._obstacle: str | None = None  # why nothing of this model is captured any more

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of a copied or saved model, captures its own graphs."""
        return StepGraphs, self._arguments

    def describe(self, cache: SinkCache) -> str:
        """How the steps of a cache run now, and why."""
        steps = self._steps.get(cache, CacheSteps())
        if steps.captured is not None:
            return "replayed from a graph"
        reason = self._obstacle or steps.reason
        return f"not captured: {reason}" if reason else f"not captured: only after {steps.steps_before} steps"

    def __call__(self, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        """Run a step."""
        step, *_ = self._arguments
        cache = running.cache
        if self._obstacle is not None or _is_capturing(running.positions):
            return step(running, kwargs)
        steps = self._steps.setdefault(cache, CacheSteps())
        steps.num_steps += 1
        if steps.captured is not None:
            if (output := steps.captured.replay(running, kwargs)) is not None:
                return output
            steps.back_off()
        if steps.num_steps <= steps.steps_before:
            return step(running, kwargs)
        return self._run_and_capture(steps, running, kwargs)

    def _run_and_capture(self, steps: CacheSteps, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        """Run a step, capture it, and compare its first replay."""
        step, fixed_step, decoder, new_graph = self._arguments
        output = step(running, kwargs)
        try:
            # Later replays may be outside of inference mode.
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(running.positions):
                check_capturable(decoder, running.cache)
                written = list(newest_tokens(running.cache))
                captured = CapturedStep(fixed_step, decoder, new_graph(), running, kwargs)
                replayed = captured.replay(running, kwargs)
                if replayed is None:
                    raise NotCapturableError("the model changes in every step")
                is_same = _agree([*_tensors(output), *written], [*_tensors(replayed), *newest_tokens(running.cache)])
        except NotCapturableError as reason:
            if steps.reason != str(reason):
                logger.info("decode steps are not captured in a graph: %s", reason)
            steps.back_off()
            steps.reason = str(reason)
            return output
        except Exception as error:  # code that waits for the device, or anything else that cannot be captured
            self._give_up(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
            return output
        if is_same:
            steps.captured, steps.num_steps, steps.reason = captured, 0, None
            logger.info("decode steps of a batch of %d are replayed from a graph", len(written[0]))
            return output
        self._give_up("a replay gives other values than the step that was captured")
        warnings.warn(
            f"sinkattn: decode steps of this {type(decoder).__name__} are not replayed from a CUDA graph, as a replay "
            "gave other values than the step that was captured; they run as without graphs",
            RuntimeWarning,
            stacklevel=2,
        )
        running.num_layers_run = 0
        return step(running, kwargs)  # once more, to write its token

    def _give_up(self, reason: str) -> None:
        self._obstacle = reason
        self._steps.clear()
        logger.info("decode steps are not captured in a graph: %s", reason)


def _is_capturing(x: Tensor) -> bool:
    """Whether the caller is capturing a graph of its own on the device of a tensor."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _tensors(output: Any) -> Iterator[Tensor]:
    return (x for x in output.values() if isinstance(x, Tensor))


def _agree(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    """Whether tensors are the same up to rounding; NaN differs from everything. Waits for the device once."""
    is_close = [
        (x - y).float().norm() <= MAX_ERROR_EPS * torch.finfo(y.dtype).eps * y.float().norm()
        for x, y in zip(got, want, strict=True)
    ]
    return bool(torch.stack(is_close).all())
