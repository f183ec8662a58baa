"""`BackgroundLearner`: a model that serves while a copy of it learns from a stream, in a thread of the same process."""

from __future__ import annotations

import atexit
import copy
import os
import queue
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from sinkattn.hf.learner import MakeOptimizer, OnlineLearner
from sinkattn.hf.model_patch import ModelPatch, PatchedForward, get_patch, require_patch
from sinkattn.hf.swap.ring_patch import RingPatch

NUM_LOSSES = 1000


class Published(NamedTuple):
    """Weights after an update, in the order of the parameters that learn."""

    weights: list[Tensor]
    num_updates: int
    is_copied: torch.cuda.Event | None
    """Recorded when they were complete; None on a CPU."""


class LearnerStatistics(NamedTuple):
    """What a `BackgroundLearner` has done so far."""

    tokens_fed: int
    """Tokens of each stream that were fed."""
    tokens_read: int
    """Those that were read, and learned from if their chunk is complete."""
    num_updates: int
    """Steps of the optimizer."""
    updates_in_use: int
    """Those whose weights the model has."""
    losses: list[float]
    """Mean loss in nats of each of the last 1,000 chunks or, if a piece ended within a chunk, parts of chunks."""


class WeightGate:
    """Lets the forwards of a model pass, and replaces its weights while none is inside.

    Args:
        patch: the patch of the model, which leads its forwards through here until `remove`.
        weights: what is replaced, in place, so that graphs find it where it was.
        automatic: whether forwards take over what was published when they begin.
        has_learner: whether a learner publishes.
    """

    def __init__(self, patch: ModelPatch, weights: list[Tensor], *, automatic: bool, has_learner: bool = True) -> None:
        self._patch, self._weights = patch, weights
        self._automatic = automatic
        self.has_learner = has_learner
        self._condition = threading.Condition()
        self._inside: Counter[int] = Counter()  # by thread; a forward may be within another one
        self._num_waiting = 0
        self._published: Published | None = None
        self._process = os.getpid()
        self.updates_in_use = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, of a copied or saved model, has no learner."""
        return partial(WeightGate, automatic=False, has_learner=False), (self._patch, [])

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
        """While it lasts, weights stay as they are."""
        if os.getpid() != self._process:
            # A fork has no thread that publishes, and may have got the lock in any state.
            yield
            return
        thread = threading.get_ident()
        with self._condition:
            # With many threads there may be a forward at any time, so new ones wait for those that are to end.
            if (self._automatic or self._num_waiting) and thread not in self._inside:
                self._take_over()
            self._inside[thread] += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside[thread] -= 1
                if not self._inside[thread]:
                    del self._inside[thread]
                self._condition.notify_all()

    def publish(self, published: Published) -> None:
        """Offer new weights."""
        with self._condition:
            self._published = published

    def take_over(self) -> bool:
        """Take over what was published, as soon as no forward runs. Returns whether there was anything."""
        with self._condition:
            if threading.get_ident() in self._inside:
                raise RuntimeError("learner: expected a call between forwards of the model, got one during a forward")
            return self._take_over()

    def _take_over(self) -> bool:
        self._num_waiting += 1
        try:
            while self._inside and self._published is not None:
                self._condition.wait()
        finally:
            self._num_waiting -= 1
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


class BackgroundLearner:
    """Learns from a stream in a thread, as `OnlineLearner` does, while the model serves.

    The thread trains a copy of the parameters that learn; all others are shared. After every update the new weights are
    published, and the model takes them over between two forwards: a forward has the same weights from its beginning to
    its end, also in other threads, and in a running `generate` the next token is the first one of the new weights. What
    a cache holds stays, as with ``after_update="keep"``.

    What learns is in memory four times: in use, in training, published, and as it was before the last chunk. With
    ``learn="all"`` these are all weights. Gradients and the state of the optimizer come on top, as in `OnlineLearner`.

    Tokens are learned from when their chunk is complete. At most ``capacity`` tokens that were fed are unread, so what
    was fed is learned from, and published, at the latest when `feed` returns ``chunk * every + capacity`` tokens later.
    Chunks without a token to learn from do not count in ``every``.

    No parameter of the model requires gradients any more. On a CUDA device the thread has a stream of its own; forwards
    of the model must be on one stream. An error of the thread is raised by the next call, and the model keeps its
    weights. At the end of the process the thread ends with the chunk that it is in.

    Args:
        model: a model prepared by `sinkattn.enable`; may be wrapped by peft. It keeps serving, in any thread.
        optimizer: see `OnlineLearner`.
        automatic: the model takes over new weights when its next forward begins; if False, only in `swap`.
        capacity: tokens of each stream that may have been fed and not been read.
        threads: CPU threads of the operators that learn; those of other threads stay as they are.
        niceness: how far the thread steps back behind all others that want the CPUs, those of other processes too
            (Linux): 0 for as much as they get, 19 for next to nothing.
        options: those of `OnlineLearner`: ``chunk``, ``learn``, ``every``, ``after_update``, ``decay``, ``max_norm``.

    Raises:
        ValueError: for an invalid argument, a model that `OnlineLearner` refuses, or one that has a learner already.
        ImportError: "lora" without peft.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
        *,
        automatic: bool = True,
        capacity: int = 4096,
        threads: int = 1,
        niceness: int = 10,
        **options: Any,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity: expected 1 or more, got {capacity}")
        if threads < 1:
            raise ValueError(f"threads: expected 1 or more, got {threads}")
        if not 0 <= niceness <= 19:
            raise ValueError(f"niceness: expected 0 to 19, got {niceness}")
        if _has_learner(model):
            raise ValueError("model: has a BackgroundLearner already; close it first")
        with torch.inference_mode(False), torch.enable_grad():
            self._serving = OnlineLearner(model, optimizer, **options)
            self._learner = _copy_what_learns(self._serving)
        model.requires_grad_(False)
        self._gate = WeightGate(require_patch(model), list(self._serving.parameters.values()), automatic=automatic)
        self._automatic, self._capacity = automatic, capacity
        self._condition = threading.Condition()
        self._pieces: deque[tuple[Tensor, Tensor]] = deque()
        self._num_streams: int | None = None
        self._tokens_fed = self._tokens_read = self._num_updates = 0
        self._losses: deque[float] = deque(maxlen=NUM_LOSSES)
        self._is_closed = False
        self._error: BaseException | None = None
        self._is_error_raised = False
        self._process = os.getpid()
        self._stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))
        self._thread = threading.Thread(
            target=self._run, args=(threads, niceness), name="sinkattn-learner", daemon=True
        )
        self._has_started = threading.Event()
        threads_here = torch.get_num_threads()
        self._thread.start()
        self._has_started.wait()
        # The number of the thread that sets it last is also that of threads that start later.
        torch.set_num_threads(threads_here)
        self._gate.install()
        atexit.register(self._stop)

    def feed(self, piece: Tensor, mask: Tensor | None = None, *, wait: bool = True) -> None:
        """Queue the next tokens of each stream to be learned from. They are copied.

        Args:
            piece: ids ``[tokens]`` or ``[batch, tokens]``, up to ``capacity`` tokens.
            mask: which of them to learn from, bool of the same shape; all of them if None.
            wait: whether to wait until there is room; else `queue.Full` is raised if there is none.

        Raises:
            ValueError: for a piece or mask of another shape, or more tokens than ``capacity``; nothing is queued.
            queue.Full: without ``wait``; nothing is queued.
            RuntimeError: if the thread has failed, or the learner is closed.
        """
        with torch.inference_mode(False):
            # Not inference tensors, which autograd does not take.
            ids, mask = (x.to("cpu", copy=True) for x in self._learner.checked(piece, mask))
        streams, tokens = ids.shape
        if tokens > self._capacity:
            raise ValueError(f"piece: expected up to {self._capacity} tokens (capacity), got {tokens}")
        with self._locked():
            while self._tokens_fed - self._tokens_read + tokens > self._capacity:
                if not wait:
                    unread = self._tokens_fed - self._tokens_read
                    raise queue.Full(f"{unread} tokens are unread, and capacity is {self._capacity}; got {tokens} more")
                self._wait()
            if self._num_streams not in (None, streams):
                raise ValueError(f"piece: expected {self._num_streams} streams, as before, got {streams}")
            self._num_streams = streams
            self._pieces.append((ids, mask))
            self._tokens_fed += tokens
            self._condition.notify_all()

    def flush(self) -> None:
        """Wait until all that was fed is read, and learned from if its chunk is complete, and published."""
        with self._locked():
            fed = self._tokens_fed
            while self._tokens_read < fed:
                self._wait()

    def swap(self) -> bool:
        """Let the model take over the newest weights now, when no forward runs. Returns whether there were new ones."""
        self._check()
        return self._gate.take_over()

    def statistics(self) -> LearnerStatistics:
        """What was done so far."""
        with self._locked():
            return LearnerStatistics(
                self._tokens_fed, self._tokens_read, self._num_updates, self._gate.updates_in_use, list(self._losses)
            )

    def save(self, path: str | Path) -> None:
        """Save what the model has learned, with its present weights, as `OnlineLearner.save` does."""
        self._check()
        with self._gate.inside():
            self._serving.save(path)

    def close(self) -> None:
        """End the thread, after the chunk that it is in; what it has not read is dropped: call `flush` before.

        With ``automatic`` the model takes over the newest weights. An error of the thread that no call has raised yet
        is raised.
        """
        self._check_process()
        if self._is_closed:
            return
        self._stop()
        atexit.unregister(self._stop)
        if self._automatic:
            self._gate.take_over()
        self._gate.remove()
        if not self._is_error_raised:
            self._raise_error()

    def __enter__(self) -> BackgroundLearner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """Refused: there is only one thread."""
        raise TypeError("a BackgroundLearner has a thread, and cannot be copied or pickled; `save` keeps its weights")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; raises RuntimeError if the learner learns no more."""
        self._check()  # first, as a fork may have got the lock in any state
        with self._condition:
            self._check()
            yield

    def _wait(self) -> None:
        """Wait until the thread has read something; raises RuntimeError if it learns no more."""
        self._condition.wait()
        self._check()

    def _check(self) -> None:
        self._check_process()
        self._raise_error()
        if self._is_closed:
            raise RuntimeError("learner: is closed")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("learner: its thread is in the process that made it, not in this fork")

    def _raise_error(self) -> None:
        if self._error is not None:
            self._is_error_raised = True
            what = f"{type(self._error).__name__}: {self._error}"
            raise RuntimeError(f"learner: its thread has failed, and learns no more: {what}") from self._error

    def _stop(self) -> None:
        if os.getpid() != self._process:
            return  # at the end of a fork
        with self._condition:
            self._is_closed = True
            self._condition.notify_all()
        self._thread.join()

    def _run(self, threads: int, niceness: int) -> None:
        """The thread."""
        try:
            torch.get_num_threads()  # or the first operator would set the number that another thread has set last
            torch.set_num_threads(threads)
            if sys.platform == "linux":  # where a thread has a priority of its own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)
            self._has_started.set()
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                while (piece := self._next_piece()) is not None:
                    self._read(*piece)
        except BaseException as error:
            with self._condition:
                self._error = error
                self._condition.notify_all()
        finally:
            self._has_started.set()

    def _next_piece(self) -> tuple[Tensor, Tensor] | None:
        """The next piece, as soon as there is one; None at the end."""
        with self._condition:
            while not self._pieces and not self._is_closed:
                self._condition.wait()
            return None if self._is_closed else self._pieces.popleft()

    def _read(self, ids: Tensor, mask: Tensor) -> None:
        """Read a piece in the parts that the learner cuts it into, and publish after each."""
        chunk, begin = self._learner.chunk, 0
        while begin < ids.shape[1] and not self._is_closed:
            end = min(begin + chunk - self._tokens_read % chunk, ids.shape[1])
            loss = self._learner.step(ids[:, begin:end], mask[:, begin:end])
            if self._learner.num_updates != self._num_updates:
                self._gate.publish(self._new_weights())
            with self._condition:
                if loss == loss:  # not NaN: something was predicted
                    self._losses.append(loss)
                self._num_updates = self._learner.num_updates
                self._tokens_read += end - begin
                self._condition.notify_all()
            begin = end

    def _new_weights(self) -> Published:
        weights = [x.detach().clone() for x in self._learner.parameters.values()]
        is_copied = None if self._stream is None else self._stream.record_event()
        return Published(weights, self._learner.num_updates, is_copied)


def _has_learner(model: PreTrainedModel) -> bool:
    patch = get_patch(model)
    forward = None if patch is None else patch.model.__dict__.get("forward")
    gate = forward.args[2].__self__ if isinstance(forward, PatchedForward) else None
    return isinstance(gate, WeightGate) and gate.has_learner


def _copy_what_learns(learner: OnlineLearner) -> OnlineLearner:
    """A copy of a learner and its model that shares with it the parameters that do not learn."""
    own = set(map(id, learner.parameters.values()))
    shared: dict[int, Any] = {}
    for x in learner.model.parameters():
        if id(x) not in own:
            shared[id(x)] = x
            if is_traceable_wrapper_subclass(x):  # a forward made for quantized weights holds what they consist of
                parts = [getattr(x, name) for name in x.__tensor_flatten__()[0]]
                shared |= {id(part): part for part in parts}
    twin = copy.deepcopy(learner, shared)
    patch = require_patch(twin.model)
    if isinstance(patch, RingPatch):
        patch.run_steps_plainly()  # it hardly makes any
    return twin
