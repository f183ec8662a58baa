"""Decode steps replayed from CUDA graphs: one launch for all kernels of a step.

What changes from token to token is on the device, so a captured step is right for every later token of its cache. Two
steps run both ways before a graph is trusted. What else a step depends on is compared in every step: inputs, settings
and the addresses of weights and rings before it is replayed, and attributes and hooks of modules afterwards, while the
device works. A step that turns out to be out of date is run again without its graph, and overwrites the token that the
replay wrote.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.swap.captured_step import (
    CapturedStep,
    NewGraph,
    NotCapturableError,
    Step,
    WaitRecorder,
    check_capturable,
    erase_newest_tokens,
    newest_tokens,
    tensors_of,
)
from sinkattn.hf.swap.layer_attention import RunningForward
from sinkattn.hf.swap.model_state import ModelState

logger = logging.getLogger("sinkattn")

# Steps of a cache before one is captured, which takes as long as a few steps. Twice as many before the next attempt
# whenever one was of no use, up to MAX_STEPS_BEFORE.
STEPS_BEFORE = 3
MAX_STEPS_BEFORE = 4096
# Steps that run with and without a new graph, the one that was captured and those that follow, with other inputs.
NUM_COMPARED = 2
# A replay runs the same kernels; but a library may choose another one.
MAX_ERROR_EPS = 8


@dataclass
class CacheSteps:
    """The steps of one cache with one `SinkCache.graph_key`."""

    captured: CapturedStep | None = None
    num_compared: int = 0
    """Steps in which ``captured`` gave what a plain step gave."""
    num_steps: int = 0
    """Steps since the last attempt to capture one."""
    steps_before: int = STEPS_BEFORE
    """Steps before the next attempt."""
    reason: str | None = None
    """Why the last attempt failed."""

    @property
    def is_replayed(self) -> bool:
        """Whether a graph replaces the steps."""
        return self.captured is not None and self.num_compared >= NUM_COMPARED

    def back_off(self, reason: str | None) -> None:
        """Wait longer before the next attempt, unless the last graph served for long."""
        was_useful = self.is_replayed and self.num_steps > self.steps_before
        self.steps_before = STEPS_BEFORE if was_useful else min(2 * self.steps_before, MAX_STEPS_BEFORE)
        self.captured, self.num_compared, self.num_steps = None, 0, 0
        if reason is not None and reason != self.reason:
            logger.info("decode steps are not captured in a graph: %s", reason)
        self.reason = reason


class StepGraphs:
    """Runs the decode steps of an enabled model: the first ones of each cache as they are, then from a graph.

    Args:
        step: a decode step; takes the state of the running forward, and the arguments of the decoder by name.
        fixed_step: the same, with nothing on the host that depends on how long the stream is.
        decoder: the decoder.
        new_graph: makes a graph, which shares memory with the others of its cache.
        is_compiled: whether the step is compiled; then it waits for nothing, and cannot be watched.
    """

    def __init__(
        self, step: Step, fixed_step: Step, decoder: nn.Module, new_graph: NewGraph, *, is_compiled: bool
    ) -> None:
        self._arguments = step, fixed_step, decoder, new_graph
        self._is_compiled = is_compiled
        # A graph writes to the rings of its cache, and is gone with it. By `graph_key`.
        self._steps: WeakKeyDictionary[SinkCache, dict[int | None, CacheSteps]] = WeakKeyDictionary()
        self._obstacle: str | None = None  # why nothing of this model is captured any more

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of a copied or saved model, captures its own graphs."""
        return partial(StepGraphs, is_compiled=self._is_compiled), self._arguments

    @property
    def has_given_up(self) -> bool:
        """Whether nothing of this model is captured any more."""
        return self._obstacle is not None

    def describe(self, cache: SinkCache) -> str:
        """How the steps of a cache run now, and why."""
        steps = self._steps.get(cache, {}).get(cache.graph_key, CacheSteps())
        if steps.is_replayed:
            return "replayed from a graph"
        reason = self._obstacle or steps.reason
        return f"not captured: {reason}" if reason else f"not captured: only after {steps.steps_before} steps"

    def __call__(self, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        """Run a step."""
        step, *_ = self._arguments
        if _is_capturing(running.positions):
            return step(running, kwargs)
        steps = self._steps_of(running.cache).setdefault(running.cache.graph_key, CacheSteps())
        steps.num_steps += 1
        if steps.is_replayed:
            assert steps.captured is not None
            if (output := steps.captured.replay(running, kwargs)) is not None:
                return output
            steps.back_off(None)
        if steps.captured is None and (self._obstacle is not None or steps.num_steps <= steps.steps_before):
            return step(running, kwargs)
        return self._run_and_compare(steps, running, kwargs)

    def _steps_of(self, cache: SinkCache) -> dict[int | None, CacheSteps]:
        return self._steps.setdefault(cache, {})

    def _run_and_compare(self, steps: CacheSteps, running: RunningForward, kwargs: dict[str, Any]) -> Any:
        """Run a step; then repeat it with its graph, which is captured if there is none, and compare."""
        step, _, decoder, _ = self._arguments
        if steps.captured is not None:
            output = step(running, kwargs)
            repeat = partial(self._is_repeated, steps.captured, output, running, kwargs)
        else:
            try:
                check_capturable(decoder, running.cache, kwargs)
            except NotCapturableError as reason:
                steps.back_off(str(reason))
                return step(running, kwargs)
            state, waits = ModelState(decoder), WaitRecorder()
            with nullcontext() if self._is_compiled else waits:
                output = step(running, kwargs)
            if waits.name is not None:
                self._give_up(f"{waits.name} waits for the device")
                steps.back_off(None)
                return output
            repeat = partial(self._capture_and_repeat, steps, state, output, running, kwargs)
        try:
            # Later replays may be outside of inference mode.
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(running.positions):
                is_same = repeat()
        except (NotCapturableError, torch.OutOfMemoryError) as reason:
            steps.back_off(str(reason).strip().partition("\n")[0])
        except Exception as error:  # anything else that cannot be captured
            self._give_up(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            steps.back_off(None)
        else:
            if is_same:
                steps.num_compared += 1
                if steps.is_replayed:
                    steps.num_steps, steps.reason = 0, None
                    assert running.cache.seen is not None
                    logger.info("decode steps of a batch of %d are replayed from a graph", len(running.cache.seen))
                return output
            self._give_up("a replay gives other values than the step itself")
            self._steps.clear()
            warnings.warn(
                f"sinkattn: decode steps of this {type(decoder).__name__} are not replayed from a CUDA graph, as a "
                "replay gave other values than the step itself; they run as without graphs",
                RuntimeWarning,
                stacklevel=2,
            )
        running.num_layers_run = 0
        return step(running, kwargs)  # again, as its token may have been overwritten

    def _capture_and_repeat(
        self, steps: CacheSteps, state: ModelState, output: Any, running: RunningForward, kwargs: dict[str, Any]
    ) -> bool:
        """Capture the step that gave this output, and whether its replay gives it too."""
        _, fixed_step, _, new_graph = self._arguments
        tensors_of(output)  # another kind of output is no reason to capture
        # Only one step of a cache runs at a time, and what it returns are copies.
        others = (x.captured.graph for x in self._steps_of(running.cache).values() if x.captured is not None)
        captured = CapturedStep(fixed_step, state, new_graph(next(others, None)), running, kwargs)
        is_same = self._is_repeated(captured, output, running, kwargs)
        steps.captured = captured
        return is_same

    def _is_repeated(
        self, captured: CapturedStep, output: Any, running: RunningForward, kwargs: dict[str, Any]
    ) -> bool:
        """Whether a replay gives the output and writes the token of the step that has just run, up to rounding."""
        cache = running.cache
        want = [*tensors_of(output), *newest_tokens(cache)]
        captured.spoil_output()
        erase_newest_tokens(cache, None if running.padding is None else running.padding.num_new)
        replayed = captured.replay(running, kwargs)
        if replayed is None:
            raise NotCapturableError("the model has changed since the capture")
        is_finite, is_same = _compare([*tensors_of(replayed), *newest_tokens(cache)], want)
        if not is_finite:
            raise NotCapturableError("there are values that are not finite")
        return is_same

    def _give_up(self, reason: str) -> None:
        self._obstacle = reason
        logger.info("decode steps are not captured in a graph: %s", reason)


def _is_capturing(x: Tensor) -> bool:
    """Whether the caller is capturing a graph of its own on the device of a tensor."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _compare(got: Sequence[Tensor], want: Sequence[Tensor]) -> tuple[bool, bool]:
    """Whether ``want`` is finite, and ``got`` the same up to rounding, in each vector. Waits for the device once."""
    flags = [
        torch.stack(
            (
                y.isfinite().all(),
                (
                    (x - y).float().norm(dim=-1) <= MAX_ERROR_EPS * torch.finfo(y.dtype).eps * y.float().norm(dim=-1)
                ).all(),
            )
        )
        for x, y in zip(got, want, strict=True)
    ]
    is_finite, is_same = torch.stack(flags).all(dim=0).tolist()
    return is_finite, is_same
