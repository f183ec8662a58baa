"""`ForwardGate`: forwards of a model and its learner take turns, and weights are replaced between forwards."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from sinkattn.hf.model_patch import ModelPatch

IDLE_SECONDS = 0.02  # longer than what is done between two tokens
PATIENCE_SECONDS = 1.0
NUM_RECENT = 8


class Published(NamedTuple):
    """Weights after an update, in the order of the parameters that learn."""

    weights: list[Tensor]
    num_updates: int
    is_copied: torch.cuda.Event | None
    """Recorded when they were complete; None on a CPU."""


class Stopped(BaseException):
    """Ends the learner before an operator."""


class ForwardGate:
    """Lets the forwards of a model pass while its learner stands still, and replaces its weights between them.

    The learner calls `pause` before every operator. It works when there has been no forward for `IDLE_SECONDS`, and
    otherwise while a forward waits for it, as long as `share` allows. A forward does not wait when it begins during one
    of another thread, unless the learner has stood still for `PATIENCE_SECONDS`: then they end first.

    Args:
        patch: the patch of the model, which leads its forwards through here until `remove`.
        weights: what is replaced, in place, so that graphs find it where it was.
        automatic: whether forwards take over what was published when they begin.
        share: time that forwards wait for the learner, of the time that they take.
        has_learner: whether a learner publishes.
    """

    def __init__(
        self, patch: ModelPatch, weights: Sequence[Tensor], *, automatic: bool, share: float, has_learner: bool = True
    ) -> None:
        self._patch, self._weights = patch, weights
        self._automatic = automatic
        self.has_learner = has_learner
        self._condition = threading.Condition()
        self._process = os.getpid()
        self._inside: dict[int, float] = {}
        """When the forward of each thread began."""
        self._forwards_waiting = self._swaps_waiting = 0
        self._published: Published | None = None
        self.updates_in_use = 0
        self._credit = _Credit(share)
        self._learner: Literal["resting", "standing", "working"] = "resting"
        self._stands_since = self._counted_until = self._paid_until = float("-inf")
        """Since when the learner stands; until when time of forwards was counted, and time that they waited paid."""
        self._is_stopped = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of a copied or saved model, has no learner."""
        return partial(ForwardGate, automatic=False, share=0, has_learner=False), (self._patch, [])

    def install(self) -> None:
        """Lead the forwards of the model through the gate."""
        self._patch.set_forward(self._patch.model, self.forward)

    def remove(self) -> None:
        """Leave the forwards alone from now on."""
        self._patch.unset_forward(self._patch.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward of the model, with the same weights from its beginning to its end."""
        with self.inside():
            return self._patch.original_forward(self._patch.model)(*args, **kwargs)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While it lasts, weights stay as they are, and the learner stands still."""
        thread = threading.get_ident()
        # A forward may be within another one. A fork has no learner, and may have got the lock in any state.
        if thread in self._inside or os.getpid() != self._process:
            yield
            return
        with self._condition:
            self._wait_to_begin()
            now = self._inside[thread] = perf_counter()
            if len(self._inside) == 1:
                self._counted_until = now
        try:
            yield
        finally:
            with self._condition:
                now = perf_counter()
                self._credit.earn(now - self._counted_until, now - self._inside.pop(thread))
                self._counted_until = now
                if self._forwards_waiting or self._swaps_waiting:
                    self._condition.notify_all()

    def check_outside(self) -> None:
        """Raises RuntimeError during a forward of this thread."""
        if threading.get_ident() in self._inside:
            raise RuntimeError("learner: expected a call between forwards of the model, got one during a forward")

    def pause(self) -> None:
        """Called by the learner before it works on: wait until it is its turn.

        Raises:
            Stopped: after `stop`.
        """
        with self._condition:
            if self._learner == "working" and self._forwards_waiting:
                now = perf_counter()
                self._credit.spend(now - self._paid_until)
                self._paid_until = now
            while (seconds := self._seconds_until_turn()) > 0:
                if self._learner != "standing":
                    self._learner, self._stands_since = "standing", perf_counter()
                    self._condition.notify_all()
                self._condition.wait(seconds)
            if self._is_stopped:
                raise Stopped
            if self._learner != "working":
                self._learner, self._paid_until = "working", perf_counter()

    def rest(self) -> None:
        """Called by the learner when it has nothing to do."""
        with self._condition:
            self._learner = "resting"
            self._condition.notify_all()

    def stop(self) -> None:
        """Let the learner work no more."""
        with self._condition:
            self._is_stopped = True
            self._condition.notify_all()

    def publish(self, published: Published) -> None:
        """Offer new weights."""
        with self._condition:
            self._published = published

    def take_over(self) -> bool:
        """Take over what was published, as soon as no forward runs. Returns whether there was anything."""
        self.check_outside()
        with self._condition:
            self._swaps_waiting += 1
            try:
                while self._inside and self._published is not None:
                    self._condition.wait()
            finally:
                self._swaps_waiting -= 1
            return self._take_over()

    def _wait_to_begin(self) -> None:
        """Wait until a forward may begin, and take over what it has to."""
        if not self._forwards_waiting:
            self._paid_until = perf_counter()
        self._forwards_waiting += 1
        self._condition.notify_all()
        try:
            while self._is_learners_turn() or (self._has_to_take_over() and self._inside):
                self._condition.wait()
        finally:
            self._forwards_waiting -= 1
        if self._has_to_take_over():
            self._take_over()

    def _is_learners_turn(self) -> bool:
        """Whether a forward has to wait for the learner."""
        # With many threads there may be a forward at any time, so in the end new ones wait for those that are inside.
        may_begin = not self._inside or perf_counter() - self._stands_since > PATIENCE_SECONDS
        return self._learner == "working" or (self._learner == "standing" and self._credit.seconds > 0 and may_begin)

    def _seconds_until_turn(self) -> float:
        """Least time until the learner's turn if no forward waits for it; 0 or less if it is its turn."""
        if self._is_stopped:
            return 0
        if self._inside:
            return IDLE_SECONDS
        if self._forwards_waiting:
            return 0 if self._credit.seconds > 0 else IDLE_SECONDS
        return 0 if self._learner == "working" else self._counted_until + IDLE_SECONDS - perf_counter()

    def _has_to_take_over(self) -> bool:
        """Whether a forward that begins takes over what was published: also if a swap waits, for the same reason."""
        return self._published is not None and (self._automatic or self._swaps_waiting > 0)

    def _take_over(self) -> bool:
        published, self._published = self._published, None
        if published is None:
            return False
        with torch.no_grad():
            if published.is_copied is not None:
                stream = torch.cuda.current_stream(self._weights[0].device)
                stream.wait_event(published.is_copied)
                for x in published.weights:
                    x.record_stream(stream)
            for x, new in zip(self._weights, published.weights, strict=True):
                x.copy_(new)
        self.updates_in_use = published.num_updates
        return True


class _Credit:
    """Time that forwards may wait for the learner.

    They earn it. An operator that takes longer leaves a debt, which is paid first. There is never more than for one
    forward, the shortest of the last `NUM_RECENT`, so that the token after a long prompt does not wait.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._recent = deque([0.0] * NUM_RECENT, maxlen=NUM_RECENT)
        self.seconds = 0.0

    def earn(self, seconds: float, forward_seconds: float) -> None:
        """Count time in which there was a forward, at the end of one that took ``forward_seconds``."""
        self._recent.append(forward_seconds)
        self.seconds = min(self.seconds + self._share * seconds, self._share * min(self._recent))

    def spend(self, seconds: float) -> None:
        self.seconds -= seconds


class _Pauses(TorchDispatchMode):
    """Calls a function before every operator of a thread."""

    supports_higher_order_operators = True

    def __init__(self, pause: Callable[[], None]) -> None:
        super().__init__()
        self._pause = pause

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """That would import the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._pause()
        return operator(*args, **(kwargs or {}))


@contextmanager
def before_operators(pause: Callable[[], None]) -> Iterator[None]:
    """While it lasts, call a function before every operator that this thread runs on a CPU, in backwards too."""
    # Not by a `with`: it would tell the compiler that every thread is in a mode, which then compiles nothing.
    _push_mode(_Pauses(pause))
    try:
        yield
    finally:
        _pop_mode()
