"""`BackgroundLearner`: a model that serves while a copy of it learns from a stream, in a thread of the same process."""

from __future__ import annotations

import atexit
import copy
import os
import queue
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from sinkattn.argument_checks import check_fraction, check_kind, check_whole
from sinkattn.hf.forward_gate import ForwardGate, Published, Stopped, before_operators
from sinkattn.hf.learner import MakeOptimizer, OnlineLearner
from sinkattn.hf.model_patch import PatchedForward, get_patch, require_patch
from sinkattn.hf.swap.ring_patch import RingPatch

NUM_LOSSES = 1000


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


class BackgroundLearner:
    """Learns from a stream in a thread, as `OnlineLearner` does, while the model serves.

    The thread trains a copy of the parameters that learn; all others are shared. After every update the new weights are
    published, and the model takes them over between two forwards: a forward has the same weights from its beginning to
    its end, also in other threads, and in a running `generate` the next token is the first one of the new weights. What
    a cache holds stays, as with ``after_update="keep"``.

    On a CPU the model and the thread never work at the same time, so neither takes cores from the other. Before every
    operator the thread lets forwards go first: it works when there was none for 20 ms and, while there are, for
    ``share`` of their time. On a CUDA device it does not wait, and has a stream of its own; forwards of the model must
    be on one stream.

    What learns is in memory four times: in use, in training, published, and as it was before the last chunk. With
    ``learn="all"`` these are all weights. Gradients and the state of the optimizer come on top, as in `OnlineLearner`.

    Tokens are learned from when their chunk is complete. At most ``capacity`` tokens that were fed are unread, so what
    was fed is learned from, and published, at the latest when `feed` returns ``chunk * every + capacity`` tokens later.
    Chunks without a token to learn from do not count in ``every``.

    No parameter of the model requires gradients any more. An error of the thread is raised by the next call, and the
    model keeps its weights. At the end of the process the thread ends, as in `close`.

    Args:
        model: a model prepared by `sinkattn.enable`; may be wrapped by peft. It keeps serving, in any thread.
        optimizer: see `OnlineLearner`.
        automatic: the model takes over new weights when its next forward begins; if False, only in `swap`.
        capacity: tokens of each stream that may have been fed and not been read.
        share: time that forwards wait for the thread, on average and of the time that they take, from 0 to 1: with 0 it
            learns only while there are none. A single one waits for an operator longer at most; those of a chunk of
            fewer tokens are shorter.
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
        share: float = 0.05,
        **options: Any,
    ) -> None:
        check_whole("capacity", capacity, 1)
        check_fraction("share", share)
        check_kind("model", model, torch.nn.Module, "a transformers PreTrainedModel")
        if _has_learner(model):
            raise ValueError("model: has a BackgroundLearner already; close it first")
        with torch.inference_mode(False), torch.enable_grad():
            self._serving = OnlineLearner(model, optimizer, **options)
            self._learner = _copy_what_learns(self._serving)
        model.requires_grad_(False)
        weights = list(self._serving.parameters.values())
        self._gate = ForwardGate(require_patch(model), weights, automatic=automatic, share=share)
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
        self._thread = threading.Thread(target=self._run, name="sinkattn-learner", daemon=True)
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
            RuntimeError: if the thread has failed, the learner is closed, or during a forward if there is no room.
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
        """Wait until all that was fed is read, and learned from if its chunk is complete, and published.

        Raises:
            RuntimeError: if the thread has failed, the learner is closed, or during a forward.
        """
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
        """End the thread, before its next operator; what it has not learned from is dropped: call `flush` before.

        On a CUDA device it ends after the chunk that it is in.

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
        """Wait until the thread has read something; raises RuntimeError if it learns no more, or cannot go on."""
        self._gate.check_outside()
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
        self._gate.stop()
        self._thread.join()

    def _run(self) -> None:
        """The thread."""
        torch.get_num_threads()  # or the first operator would set the number that another thread has set last
        # With a second pool of threads libgomp counts more threads than CPUs: then all pools wait asleep instead of
        # spinning, and a token takes twice as long.
        torch.set_num_threads(1)
        self._has_started.set()
        # Kernels of a CUDA device are launched ahead, and its gradients computed in a thread that others use as well.
        turns = before_operators(self._gate.pause) if self._stream is None else torch.cuda.stream(self._stream)
        try:
            with turns:
                while (piece := self._next_piece()) is not None:
                    self._read(*piece)
        except Stopped:
            pass
        except BaseException as error:
            with self._condition:
                self._error = error
                self._condition.notify_all()
        finally:
            self._gate.rest()

    def _next_piece(self) -> tuple[Tensor, Tensor] | None:
        """The next piece, as soon as there is one; None at the end."""
        self._gate.rest()
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
    return isinstance(gate, ForwardGate) and gate.has_learner


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
