"""`Stream`: one endless stream of a `StreamPool`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from sinkattn.argument_checks import check_path, check_whole
from sinkattn.hf.cache.stream_file import write_streams
from sinkattn.hf.pool import saved
from sinkattn.hf.pool.generation import Generation, without_blocking
from sinkattn.hf.pool.model import PoolModel
from sinkattn.hf.pool.scheduler import Scheduler
from sinkattn.hf.pool.state import StreamState
from sinkattn.hf.pool.stops import StopStrings, each_stop
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.stream import DECODE_CONTEXT, stream_text


class Stream:
    """One endless stream of a `StreamPool`, which begins it in `StreamPool.open`. Any thread may use it.

    What is fed and what is generated follow each other: nothing has to be handed over twice. ``len(stream)`` is the
    number of tokens so far, less those that were rolled back.
    """

    def __init__(self, model: PoolModel, scheduler: Scheduler, state: StreamState) -> None:
        self._model, self._scheduler, self._state = model, scheduler, state

    def __len__(self) -> int:
        return self._scheduler.length_of(self._state)

    def __repr__(self) -> str:
        """Number of tokens, and where they are."""
        state = self._state
        if state not in self._scheduler.streams:
            return "Stream(closed)"
        return f"Stream(tokens={len(state)}, prefix={len(state.prefix)}, memory={state.memory.place!r})"

    def __reduce__(self) -> NoReturn:
        """Refused: it is a handle on a stream of a pool."""
        raise TypeError("a Stream can be neither copied nor pickled; use fork() for a copy, save() for a file")

    @property
    def prefix(self) -> list[int]:
        """Ids that stay in sight for ever."""
        return [*self._state.prefix]

    @property
    def notes(self) -> dict[str, Any]:
        """Anything that is JSON, for whoever uses the stream: saved with it, and copied by `fork`; empty at first."""
        return self._state.notes

    @property
    def in_sight(self) -> list[int]:
        """Ids that the last token sees, itself included: prefix or sinks, and window."""
        with self._scheduler.locked(self._state) as state:
            return state.ids.in_sight(state.window_begin(len(state.queue) - 1), state.queue).tolist()

    @property
    def is_text_complete(self) -> bool:
        """Whether its grammar, if it has one, is at the end of a text, so that the next token begins another one."""
        return self._state.is_text_complete

    @property
    def message_begins(self) -> list[int]:
        """First tokens of the messages all of which are in sight, as numbers of tokens; none without their eviction."""
        with self._scheduler.locked(self._state) as state:
            if state.messages is None:
                return []
            layout, count = state.ids.layout, len(state)
            first = max(state.window_begin(len(state.queue) - 1), count - layout.window)
            return [begin for begin in state.messages.begins if first <= begin < count]

    def feed(
        self,
        tokens: str | Sequence[int] | Tensor,
        *,
        begins_message: bool = True,
        num_following: int = 0,
        wait: bool = True,
    ) -> None:
        """Append tokens; returns when they are in memory.

        Args:
            tokens: text, or ids ``[tokens]`` or ``[1, tokens]``. The first text of a stream gets the special tokens
                that begin one.
            begins_message: whether they begin a message; of effect only with ``evict="message"``.
            num_following: how many tokens will follow at once for which this message makes room, too, such as those
                that a reply begins with; up to the window. So all of them see the same messages, and can run in one
                forward.
            wait: if False, returns at once; the tokens run with those that are fed or generated next.

        Raises:
            ValueError: for an invalid argument, text without a tokenizer, or ids that the model does not have.
        """
        length = self._append(tokens, begins_message=begins_message, num_following=num_following)
        if wait:
            self._wait_until_fed(length)

    def _append(self, tokens: str | Sequence[int] | Tensor, *, begins_message: bool, num_following: int) -> int:
        """Append tokens, which wait; returns the length of the stream."""
        check_whole("num_following", num_following)
        ids = self._model.ids_of("tokens", tokens, is_first=not len(self))
        with self._scheduler.locked(self._state) as state:
            if num_following > (window := state.ids.layout.window):  # else nothing is in sight until so many came
                raise ValueError(f"num_following: expected up to the window, {window}, got {num_following}")
            if ids:
                state.drop_ready()
                if state.messages is not None and begins_message:
                    state.messages.begin(len(state), len(ids) + num_following, len(state.ids))
                state.queue.extend(ids)
            return len(state)

    def catch_up(self) -> None:
        """Run the tokens that wait: of `feed` with ``wait=False``, and the last one that was generated.

        For a moment in which nobody waits, so that less is to be run when something follows. As long as the stream is
        in the memory of the device: no other one is parked for this. A stream that is closed has nothing to run.
        """
        self._wait_until_fed(len(self), or_parked=True)

    def _wait_until_fed(self, length: int, *, or_parked: bool = False) -> None:
        """Return when so many tokens of the stream, or all of them, are in memory, or when it has no row."""
        state = self._state

        def is_done() -> bool:
            return not state.queue or len(state.ids) >= length or (or_parked and state.memory.row is None)

        with self._scheduler.condition:
            state.num_feeding += 1
            try:
                self._scheduler.wait(state, is_done)
            finally:
                state.num_feeding -= 1

    def generate(
        self,
        max_new_tokens: int | None = None,
        *,
        stop: Collection[int | str] = (),
        sampling: SamplingParams | None = None,
    ) -> Generator[int]:
        """Generate tokens, one for each ``next``, without end unless something ends it.

        A token belongs to the stream when it is yielded. A stream has one such iterator at a time: close one that is
        left before its end. The model's end token is a token like others unless ``stop`` has it.

        Args:
            max_new_tokens: the most tokens; None for no limit.
            stop: ids and texts that end it, or one text. Such an id is not yielded and does not belong to the stream; a
                text ends with the token that completes it.
            sampling: how tokens are chosen from now on; default: as before.

        Raises:
            TypeError, ValueError: for an invalid argument.
            RuntimeError: while it runs: a stream that is closed, has no tokens, or has such an iterator already.
        """
        stops = self._stop_strings(stop)
        return self._tokens(self._generation(max_new_tokens, stop, sampling), stops)

    def generate_text(
        self,
        max_new_tokens: int | None = None,
        *,
        stop: Collection[int | str] = (),
        sampling: SamplingParams | None = None,
    ) -> Generator[str]:
        """Generate text, a piece, maybe empty, for each token; otherwise as `generate`.

        Bytes are held back until their character is complete, and text as long as it may begin a text of ``stop``,
        which is not yielded.
        """
        stops = self._text_stops(stop)
        return self._text(self._generation(max_new_tokens, stop, sampling), stops)

    def _stop_strings(self, stop: Collection[int | str]) -> StopStrings | None:
        strings = [x for x in each_stop(stop) if isinstance(x, str)]
        if strings and self._model.tokenizer is None:
            raise ValueError(f"stop: expected ids, as the pool has no tokenizer, got {strings[0]!r}")
        if "" in strings:
            raise ValueError("stop: expected texts of one character or more, got ''")
        return StopStrings(strings) if strings else None

    def _text_stops(self, stop: Collection[int | str]) -> StopStrings:
        if self._model.tokenizer is None:
            raise ValueError("tokenizer: expected one, given to StreamPool, for text, got None")
        return self._stop_strings(stop) or StopStrings([])

    def _generation(
        self, max_new_tokens: int | None, stop: Collection[int | str], sampling: SamplingParams | None
    ) -> Generation:
        if max_new_tokens is not None:
            check_whole("max_new_tokens", max_new_tokens)
        self._model.check_enabled()
        sampler = None if sampling is None else self._model.new_sampler(sampling)
        stop_ids = frozenset(x for x in each_stop(stop) if not isinstance(x, str))
        return Generation(self._scheduler, self._state, sampler, stop_ids, max_new_tokens)

    def _tokens(self, generation: Generation, stops: StopStrings | None) -> Generator[int]:
        return generation.tokens() if stops is None else self._until(generation.tokens(), stops)

    def _decoded(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text of tokens that this stream generates."""
        assert self._model.tokenizer is not None
        with self._scheduler.locked(self._state) as state:
            before = [*state.ids.last(DECODE_CONTEXT), *state.queue]
        return stream_text(self._model.tokenizer, tokens, before)

    def _until(self, tokens: Generator[int], stops: StopStrings) -> Generator[int]:
        """These tokens until their text has one of the strings."""
        last: list[int] = []

        def noted() -> Iterator[int]:
            for token in tokens:
                last.append(token)
                yield token

        try:
            for piece in self._decoded(noted()):
                stops.add(piece)
                if last:
                    yield last.pop()
                if stops.found:
                    return
        finally:
            tokens.close()

    def _text(self, generation: Generation, stops: StopStrings) -> Generator[str]:
        tokens = generation.tokens()
        try:
            for piece in self._decoded(tokens):
                yield stops.add(piece)
                if stops.found:
                    return
            yield stops.rest()
        finally:
            tokens.close()

    async def feed_async(
        self, tokens: str | Sequence[int] | Tensor, *, begins_message: bool = True, num_following: int = 0
    ) -> None:
        """`feed` for asyncio. The tokens belong to the stream also if it is cancelled."""
        length = self._append(tokens, begins_message=begins_message, num_following=num_following)
        await asyncio.to_thread(self._wait_until_fed, length)

    def generate_async(
        self,
        max_new_tokens: int | None = None,
        *,
        stop: Collection[int | str] = (),
        sampling: SamplingParams | None = None,
    ) -> AsyncIterator[int]:
        """`generate` for asyncio."""
        stops, generation = self._stop_strings(stop), self._generation(max_new_tokens, stop, sampling)
        return without_blocking(generation, self._tokens(generation, stops))

    def generate_text_async(
        self,
        max_new_tokens: int | None = None,
        *,
        stop: Collection[int | str] = (),
        sampling: SamplingParams | None = None,
    ) -> AsyncIterator[str]:
        """`generate_text` for asyncio."""
        stops, generation = self._text_stops(stop), self._generation(max_new_tokens, stop, sampling)
        return without_blocking(generation, self._text(generation, stops))

    def fork(self) -> Stream:
        """An independent copy, which goes on from here; with the same sampling it draws the same tokens.

        Raises:
            PoolFullError: if there is no room.
            OSError: if it, or another stream for it, has to go to disk or come back, and cannot.
        """
        with self._scheduler.exclusive(self._state) as state:
            self._scheduler.check_room()
            state.drop_ready()
            fork = self._scheduler.engine.fork(state)
        self._scheduler.add(fork)
        return Stream(self._model, self._scheduler, fork)

    def rollback(self, count: int) -> None:
        """Forget the last ``count`` tokens, as if they had never come.

        But random numbers go on, so that what is generated again may be something else; a grammar begins its text anew.

        Until the ring is full any number can be forgotten, then up to the headroom of `sinkattn.enable`, less the
        ``num_tokens`` of the pool's speculation. If the next thing is `generate`, it runs the last token again, so for
        a model that streams by re-encoding it is one fewer.

        Raises:
            ValueError: for a negative number.
            RuntimeError: if so many cannot be forgotten; nothing is changed.
        """
        check_whole("count", count)
        with self._scheduler.exclusive(self._state) as state:
            waiting = min(count, len(state.queue))
            in_memory = count - waiting
            if in_memory and not self._scheduler.engine.memory.can_rollback(state.memory, in_memory):
                raise RuntimeError(
                    f"stream: cannot forget {count} of {len(state)} tokens; the headroom of sinkattn.enable is "
                    f"{state.ids.layout.headroom}"
                )
            if not count:
                return
            state.drop_ready()
            state.begin_text()
            for _ in range(waiting):
                state.queue.pop()
            if in_memory:
                self._scheduler.engine.rollback(state, in_memory)
            if state.messages is not None:
                state.messages.rollback(len(state))

    def reset(self) -> None:
        """Begin anew, with the same prefix."""
        with self._scheduler.exclusive(self._state) as state:
            state.drop_ready()
            self._scheduler.engine.drop(state)
            state.begin_anew()

    def save(self, path: str | Path) -> None:
        """Save the stream to a file, from which `StreamPool.load` opens it again, in another process too.

        `sinkattn.load_stream` makes a cache of it. The file has the bytes of its keys and values, the logits of its
        last token, and little more; a file that exists is replaced as a whole.

        Raises:
            OSError: the file cannot be written, or the stream is parked on disk and cannot come back.
            RuntimeError: if the model is not enabled any more.
        """
        check_path("path", path)
        with self._scheduler.exclusive(self._state) as state:
            state.drop_ready()
            engine = self._scheduler.engine
            memory, logits = engine.snapshot(state)
            parts = saved.file_parts(self._model.patch, state, engine.memory, memory, logits)
        write_streams(path, *parts)  # while others go on

    def close(self) -> None:
        """Forget the stream and free its memory."""
        self._scheduler.remove(self._state)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
