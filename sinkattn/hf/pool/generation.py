"""`Generation`: one call of `Stream.generate`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Generator
from typing import TypeVar

from sinkattn.hf.pool.scheduler import Scheduler
from sinkattn.hf.pool.state import StreamState
from sinkattn.hf.sampling.stream_sampler import StreamSampler

T = TypeVar("T")


class Generation:
    """Generates tokens of a stream until something ends it. It begins when the first one is wanted.

    Args:
        scheduler: of the pool.
        state: the stream.
        sampler: chooses the tokens; None for that of the stream.
        stop_ids: tokens that end it, and do not belong to the stream.
        max_new_tokens: the most tokens; None for no limit.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        state: StreamState,
        sampler: StreamSampler | None,
        stop_ids: Collection[int],
        max_new_tokens: int | None,
    ) -> None:
        self._scheduler, self._state, self._sampler, self._stop_ids = scheduler, state, sampler, stop_ids
        self._max_new_tokens = max_new_tokens
        self._has_begun = self._has_ended = False

    def tokens(self) -> Generator[int]:
        """The tokens, one for each ``next``."""
        try:
            while (token := self._next()) is not None:
                yield token
        finally:
            self.end()

    @property
    def is_ready(self) -> bool:
        """Whether the next token, or the end, can be had without waiting."""
        with self._scheduler.condition:
            return bool(self._state.ready) if self._is_running else self._has_begun

    def wait(self) -> None:
        """Wait for the next token, or for the end."""
        if not self._has_begun:
            self._begin()
        state = self._state
        with self._scheduler.condition:
            while self._is_running and not state.ready:
                self._scheduler.check_open(state)
                self._ensure_logits()
                state.wants_token = True
                self._scheduler.wait(state, lambda: not self._is_running or bool(state.ready) or not state.can_choose)

    def end(self) -> None:
        """End it, if it has not ended by itself.

        It may be a garbage collection that does so, at any point of this thread, so this waits for no step and wakes
        nobody.
        """
        with self._scheduler.condition:
            self._has_ended = True
            if self._is_running:
                self._stop()

    def cancel(self) -> None:
        """End it, and a `wait` of another thread."""
        with self._scheduler.condition:
            self.end()
            self._scheduler.notify()

    @property
    def _is_running(self) -> bool:
        return self._state.generation is self

    def _begin(self) -> None:
        with self._scheduler.exclusive(self._state) as state:
            if self._has_ended:
                return
            if state.generation is not None:
                raise RuntimeError("stream: generates already; finish or close the iterator of that call first")
            self._has_begun = True
            if self._sampler is not None:
                state.sampler = self._sampler
            if self._max_new_tokens != 0:
                state.generation, state.num_left = self, self._max_new_tokens

    def _stop(self) -> None:
        self._state.drop_ready()
        self._state.generation, self._state.wants_token = None, False

    def _next(self) -> int | None:
        """The next token, which the stream gets; None at the end."""
        state = self._state
        while True:
            self.wait()
            with self._scheduler.condition:
                if not self._is_running:
                    return None
                if not state.ready:
                    continue  # something was fed in between
                if state.ready[0].token in self._stop_ids:
                    return None
                token = self._scheduler.engine.hand_out(state)
                if state.num_left is not None:
                    state.num_left -= 1
                if state.num_left == 0 or (not state.ready and state.is_text_complete):
                    self._stop()
                return token

    def _ensure_logits(self) -> None:
        """Let the last token run again if the logits after it are not known; then the stream is in no step."""
        state, engine = self._state, self._scheduler.engine
        if not len(state):
            raise RuntimeError("stream: expected tokens to go on from, got none; feed some first")
        if state.can_choose:
            return
        if not engine.memory.can_go_on(state.memory, 1):
            raise RuntimeError(
                "stream: cannot go on, as after rollback the last token has to run again, and the headroom of "
                f"sinkattn.enable, {state.ids.layout.headroom}, is used up; feed something"
            )
        [token] = state.ids.last(1)
        engine.rollback(state, 1)
        state.queue.appendleft(token)


async def without_blocking(generation: Generation, items: Generator[T]) -> AsyncIterator[T]:
    """Items that are made of the tokens of a generation: threads wait for these, but do not take them.

    So a stream has no token that a task that was cancelled has not got.
    """
    try:
        while True:
            if generation.is_ready:
                await asyncio.sleep(0)
            while not generation.is_ready:  # also if something is fed before this task goes on
                await asyncio.to_thread(generation.wait)
            if (item := next(items, None)) is None:
                return
            yield item
    finally:
        items.close()
        generation.cancel()
