"""`Scheduler`: the threads that use the streams of a pool take turns, and run its steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.state import StreamState

Arg = TypeVar("Arg")
Result = TypeVar("Result")


class PoolFullError(RuntimeError):
    """There is no room for another stream."""


class Scheduler:
    """Runs steps of an engine in the thread that waits for one, and holds the streams that are open.

    Args:
        engine: what runs.
        max_open: the most streams that are open.

    Attributes:
        max_open: these.
        condition: its lock protects everything but what a forward changes.
    """

    def __init__(self, engine: Engine, max_open: int) -> None:
        self.engine = engine
        self.max_open = max_open
        # In order: processes that run the same calls run the same steps, which ranks of a model have to.
        self._streams: dict[StreamState, None] = {}
        self.condition = threading.Condition()
        self._is_stepping = False
        self._is_closed = False
        self._num_exclusive = 0
        self._num_notices = 0
        self._num_asleep = 0
        """Threads in `wait` that have had no notice."""
        self._num_waking = 0
        """Those that have had one, and have not looked yet."""

    def __len__(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    @property
    def streams(self) -> list[StreamState]:
        """Those that are open."""
        return [*self._streams]

    def check_room(self) -> None:
        """Raise PoolFullError if there is no room for another stream, RuntimeError after `close`."""
        if self._is_closed:
            raise RuntimeError("pool: is closed")
        if len(self._streams) >= self.max_open:
            raise PoolFullError(f"pool: {self.max_open} streams are open, the most that it takes; close one first")

    def add(self, state: StreamState) -> None:
        """Take in a stream; raises as `check_room`, and OSError if one has to go to disk for it and cannot."""
        with self._no_step():
            self.check_room()
            if state.memory.contents is not None:
                self._is_stepping = True
                try:
                    self._without_lock(self.engine.make_room, [*self._streams, state])
                finally:
                    self._is_stepping = False
                    self.notify()
            self._streams[state] = None

    def remove(self, state: StreamState) -> None:
        """Forget a stream. Whoever waits for it gets an error."""
        with self._no_step():
            if state in self._streams:
                del self._streams[state]
                state.drop_ready()
                self.engine.drop(state)

    def close(self) -> None:
        """Forget all streams, and take in no more."""
        with self._no_step():
            self._is_closed = True
            for state in [*self._streams]:
                self.remove(state)

    @contextmanager
    def locked(self, state: StreamState) -> Iterator[StreamState]:
        """While it lasts, no other thread changes a stream, except by a forward; raises RuntimeError if it is closed.

        That is enough for what only adds to a stream. It waits for no step.
        """
        with self.condition:
            self.check_open(state)
            yield state

    @contextmanager
    def exclusive(self, state: StreamState) -> Iterator[StreamState]:
        """While it lasts, no step runs; raises RuntimeError if the stream is closed."""
        with self._no_step():
            self.check_open(state)
            yield state

    def check_open(self, state: StreamState) -> None:
        """Raise RuntimeError if a stream is closed."""
        if state not in self._streams:
            raise RuntimeError("stream: is closed")

    @contextmanager
    def _no_step(self) -> Iterator[None]:
        with self.condition:
            self._num_exclusive += 1
            try:
                while self._is_stepping:
                    self.condition.wait()
            finally:
                self._num_exclusive -= 1
                self.notify()
            yield

    def length_of(self, state: StreamState) -> int:
        """Tokens of a stream, those that wait among them."""
        with self.condition:  # or a step might be about to move tokens from the queue to those in memory
            return len(state)

    def wait(self, state: StreamState, is_done: Callable[[], bool]) -> None:
        """Run steps, or wait for those of other threads, until something is done for a stream.

        The lock is held, once. Raises RuntimeError if the stream is closed, or else why it cannot go on.
        """
        try:
            while not is_done():
                self.check_open(state)
                if state.error is not None:
                    error, state.error = state.error, None
                    raise error
                if self._is_stepping or self._num_exclusive or self._num_waking:
                    self._sleep()
                else:
                    self._run_step()
        finally:
            if not self._num_waking and not self._is_stepping and self._num_asleep:
                self.notify()  # one of them runs the next step

    def _sleep(self) -> None:
        """Wait until `notify` is called."""
        notices = self._num_notices
        self._num_asleep += 1
        try:
            self.condition.wait()
        finally:
            if self._num_notices == notices:
                self._num_asleep -= 1  # interrupted
            else:
                self._num_waking -= 1

    def notify(self) -> None:
        """Wake all threads that wait.

        The next step runs after all of them have looked whether there is a token for them, and some have come back for
        another one: so these share it.
        """
        self._num_notices += 1
        self._num_waking += self._num_asleep
        self._num_asleep = 0
        self.condition.notify_all()

    def _run_step(self) -> None:
        """Run a step; the lock is free while the model runs."""
        self._is_stepping = True
        sampled: list[StreamState] = []
        try:
            with self.engine.modes():
                if any(state.has_work and state.memory.row is None for state in self._streams):
                    self._without_lock(self.engine.give_rows, self._streams)
                step = self.engine.plan([state for state in self._streams if state.has_work])
                for segments in step.forwards:
                    self._without_lock(self.engine.run, segments)
                    self.engine.commit(segments)
                sampled = step.sampled
                choices = self._without_lock(self.engine.choose, sampled)
            for state, ready in zip(sampled, choices, strict=True):
                state.ready = ready
                state.end_choices()
                if not state.wants_token or state.queue:
                    state.drop_ready()  # the call has ended since, or something was fed
        except BaseException:
            for state in sampled:
                state.end_choices()
            raise
        finally:
            self._is_stepping = False
            self.notify()

    def _without_lock(self, function: Callable[[Arg], Result], arg: Arg) -> Result:
        """Call a function without the lock, which is held again afterwards, once, whatever interrupts this.

        An interruption may come after the lock has been released or acquired and before the call that did so returns,
        also between the methods of a context manager.
        """
        try:
            self.condition.release()
            return function(arg)
        finally:
            interruption, is_locked = None, False
            while not is_locked:
                try:
                    is_locked = self._holds_lock() or self.condition.acquire()
                except BaseException as error:
                    interruption = error
            if interruption is not None:
                raise interruption

    def _holds_lock(self) -> bool:
        """Whether this thread holds the lock."""
        try:
            self.condition.notify(0)
        except RuntimeError:
            return False
        return True
