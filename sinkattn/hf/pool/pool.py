"""`StreamPool`: many endless streams of one model, batched over one ring per layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkattn.hf.fingerprint import Accepted
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.pool import saved
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.memory import StreamMemory, memory_for
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.pool.state import StreamState
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.hf.stream import end_ids


class PoolFullError(RuntimeError):
    """There is no room for another stream."""


class StreamPool:
    """Continuous batching of endless streams: each has a row in one ring per layer, of constant size.

    Streams of any age share the forwards. A stream's tokens are those of the stream run alone: its logits are equal up
    to rounding, as the order of sums depends on the shape of a batch. A stream of which nobody wants anything costs
    memory alone. If more streams are open than there are rows, those of which nobody wants anything are parked in host
    memory, and come back by themselves; if all are wanted, they take turns.

    Whoever waits for something, in `Stream.feed` or `Stream.generate`, runs steps for all streams until it is there;
    other threads wait for these steps. A step runs a token of each stream that generates, which gets the next one ready
    for whoever asks, and up to ``tokens_per_step`` of those that are fed: a long text delays others by a bounded time.

    Models with recurrent states and those that stream by re-encoding have a cache for each stream, and a forward for
    each, which is not batched.

    Args:
        model: prepared by `sinkattn.enable`.
        max_streams: rows: how many streams are in the memory of the device at once.
        max_parked: how many streams more may be open.
        tokenizer: for text.
        max_prefix: the most tokens of a prefix; each row has slots for so many sinks. Default: the sinks of `enable`.
        tokens_per_step: the most tokens of a step that are fed rather than generated.

    Raises:
        ValueError: for an invalid argument, or a model that is not enabled.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_streams: int = 64,
        *,
        max_parked: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_prefix: int = 0,
        tokens_per_step: int = 512,
    ) -> None:
        for name, value, least in (
            ("max_streams", max_streams, 1),
            ("max_parked", max_parked, 0),
            ("max_prefix", max_prefix, 0),
            ("tokens_per_step", tokens_per_step, 1),
        ):
            if value < least:
                raise ValueError(f"{name}: expected {least} or more, got {value}")
        self._patch = require_patch(model)
        self.model, self.tokenizer = model, tokenizer
        self._max_sinks = max(self._patch.layout.num_sinks, max_prefix)
        self._max_open = max_streams + max_parked
        self._vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
        memory = memory_for(model, max_streams, self._max_sinks)
        self.engine = Engine(memory, max_streams, tokens_per_step, model.device.type)
        self._streams: set[StreamState] = set()
        self.condition = threading.Condition()
        """Its lock protects everything but what a forward changes."""
        self._is_stepping = False
        self._num_exclusive = 0

    def open(
        self,
        prefix: str | Sequence[int] | Tensor = (),
        *,
        sampling: SamplingParams | None = None,
        evict: Literal["token", "message"] = "token",
    ) -> Stream:
        """Begin a stream.

        Args:
            prefix: text or ids that stay in sight for ever, as the sinks of this stream: a system prompt. A shorter one
                than the sinks of `enable` is followed by the first tokens that are fed.
            sampling: how tokens are chosen; greedy by default.
            evict: what leaves the window at a time. "token": the oldest token. "message": the whole oldest message, as
                soon as a part of it does not fit, so that a token sees the prefix and whole messages; only of a message
                that is longer than the window it sees the last tokens. Each `Stream.feed` begins a message.

        Raises:
            PoolFullError: if there is no room.
            ValueError: for a prefix longer than ``max_prefix``, or another invalid argument.
        """
        if evict not in ("token", "message"):
            raise ValueError(f"evict: expected 'token' or 'message', got {evict!r}")
        ids = self.ids_of("prefix", prefix, is_first=True)
        if len(ids) > self._max_sinks:
            raise ValueError(f"prefix: expected up to {self._max_sinks} tokens (max_prefix), got {len(ids)}")
        num_sinks = max(len(ids), self._patch.layout.num_sinks)
        if evict == "message" and not self.engine.memory.is_batched:
            raise ValueError(
                "evict: expected 'token', as models with recurrent states and those that stream by re-encoding do not "
                "evict whole messages, got 'message'"
            )
        layout = self._patch.layout_with(num_sinks)
        params = SamplingParams() if sampling is None else sampling
        messages = Messages(num_sinks, layout.window, layout.headroom) if evict == "message" else None
        memory = StreamMemory(num_sinks)
        state = StreamState(ids, self.new_sampler(params), memory, StreamIds(layout), messages)
        state.begin_anew()
        return self.add(state)

    def load(
        self, path: str | Path, *, sampling: SamplingParams | None = None, accept: Collection[Accepted] = ()
    ) -> Stream:
        """Open a stream that `Stream.save` has saved, of any pool with this model; it goes on where it was.

        Args:
            path: the file.
            sampling: how tokens are chosen from now on; default: as it was saved, with the same random numbers.
            accept: see `sinkattn.load_stream`.

        Raises:
            PoolFullError: if there is no room.
            ValueError, OSError: as `sinkattn.load_stream`; for a longer prefix than this pool takes; and for a stream
                with logits processors, without ``sampling``.
        """
        state = saved.load(
            path,
            self._patch,
            self.engine.memory,
            self.new_sampler,
            vocabulary=self._vocabulary,
            sampling=sampling,
            accept=accept,
        )
        if state.memory.num_sinks > self._max_sinks:
            raise ValueError(
                f"path: num_sinks: expected up to {self._max_sinks} (max_prefix), got {state.memory.num_sinks}"
            )
        return self.add(state)

    def save(self, path: str | Path, state: StreamState) -> None:
        """Save a stream, while no step runs."""
        saved.save(path, self._patch, self.engine.memory, state, self.engine.logits_on_host(state))

    def add(self, state: StreamState) -> Stream:
        """Take in a stream; raises PoolFullError if there is no room."""
        with self._no_step():
            if len(self._streams) >= self._max_open:
                raise PoolFullError(f"pool: {self._max_open} streams are open, the most that it takes; close one first")
            self._streams.add(state)
        return Stream(self, state)

    def remove(self, state: StreamState) -> None:
        """Forget a stream. Whoever waits for it gets an error."""
        with self._no_step():
            if state in self._streams:
                self._streams.remove(state)
                state.drop_ready()
                self.engine.drop(state)

    def new_sampler(self, params: SamplingParams) -> StreamSampler:
        """Sampler of a stream; raises ValueError or ImportError as `StreamSampler`."""
        return StreamSampler(params, vocabulary=self._vocabulary, end_ids=end_ids(self.model), tokenizer=self.tokenizer)

    def ids_of(self, name: str, tokens: str | Sequence[int] | Tensor, *, is_first: bool) -> list[int]:
        """Ids of the argument ``name``; raises ValueError if there are others than the model has.

        is_first: whether text gets the special tokens that begin a stream.
        """
        if isinstance(tokens, str):
            if self.tokenizer is None:
                raise ValueError(f"{name}: expected ids, as the pool has no tokenizer, got text")
            tokens = self.tokenizer(tokens, add_special_tokens=is_first, verbose=False).input_ids
        ids = torch.as_tensor(tokens)
        ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if ids.ndim != 1 or (ids.is_floating_point() and len(ids)):
            raise ValueError(f"{name}: expected text or ids [tokens], got {ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._vocabulary:
            raise ValueError(
                f"{name}: expected ids from 0 to {self._vocabulary - 1}, got {int(ids.min())} to {int(ids.max())}"
            )
        return [int(x) for x in ids.tolist()]

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
                self.condition.notify_all()
            yield

    def length_of(self, state: StreamState) -> int:
        """Tokens of a stream, those that wait among them."""
        with self.condition:  # or a step might be about to move tokens from the queue to those in memory
            return len(state)

    def wait(self, state: StreamState, is_done: Callable[[], bool]) -> None:
        """Run steps, or wait for those of other threads, until something is done for a stream.

        The lock is held, once. Raises RuntimeError if the stream is closed, or else why it cannot go on.
        """
        while not is_done():
            self.check_open(state)
            if state.error is not None:
                error, state.error = state.error, None
                raise error
            if self._is_stepping or self._num_exclusive:
                self.condition.wait()
            else:
                self._run_step()

    def _run_step(self) -> None:
        """Run a step; the lock is free while the model runs."""
        self._is_stepping = True
        sampled: list[StreamState] = []
        try:
            step = self.engine.plan([state for state in self._streams if state.has_work])
            for segments in step.forwards:
                with self._unlocked():
                    self.engine.run(segments)
                self.engine.commit(segments)
            sampled = step.sampled
            with self._unlocked():
                tokens = self.engine.choose(sampled)
            for state, token in zip(sampled, tokens, strict=True):
                state.ready = token
                if not state.wants_token or state.queue:
                    state.drop_ready()  # the call has ended since, or something was fed
        except BaseException:
            for state in sampled:
                if state.ready is None:
                    state.undo_choice()
            raise
        finally:
            self._is_stepping = False
            self.condition.notify_all()

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Without the lock, which is held again afterwards, whatever interrupts the wait for it."""
        self.condition.release()
        try:
            yield
        finally:
            interruption, is_locked = None, False
            while not is_locked:
                try:
                    is_locked = self.condition.acquire()
                except BaseException as error:
                    interruption = error
            if interruption is not None:
                raise interruption

    def __len__(self) -> int:
        """Streams that are open."""
        return len(self._streams)

    def __reduce__(self) -> NoReturn:
        """Refused: threads may wait for a pool, and its streams have handles."""
        raise TypeError("a StreamPool can be neither copied nor pickled; Stream.fork copies a stream")

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device."""
        return self.engine.memory.nbytes

    def close(self) -> None:
        """Close all streams."""
        with self._no_step():
            for state in [*self._streams]:
                self.remove(state)

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
