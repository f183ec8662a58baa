"""`StreamPool`: many endless streams of one model, batched over one ring per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinkattn.argument_checks import check_whole
from sinkattn.hf.fingerprint import Accepted
from sinkattn.hf.pool import saved
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.leading import LeadingMemory
from sinkattn.hf.pool.memory import Memory, StreamMemory, memory_for
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.pool.model import PoolModel
from sinkattn.hf.pool.scheduler import Scheduler
from sinkattn.hf.pool.speculation import DraftModel, Speculation, drafter_for
from sinkattn.hf.pool.state import StreamState
from sinkattn.hf.pool.stream import Stream
from sinkattn.hf.ranks import num_ranks
from sinkattn.hf.sampling.params import SamplingParams


class StreamPool:
    """Continuous batching of endless streams: each has a row in one ring per layer, of constant size.

    Streams of any age share the forwards. A stream's tokens are those of the stream run alone: its logits are equal up
    to rounding, as the order of sums depends on the shape of a batch. A stream of which nobody wants anything costs
    memory alone. If more streams are open than there are rows, those of which nobody wants anything are parked, in host
    memory and then on disk, and come back by themselves; if all are wanted, they take turns.

    Whoever waits for something, in `Stream.feed` or `Stream.generate`, runs steps for all streams until it is there;
    other threads wait for these steps. A step runs a token of each stream that generates, which gets the next one ready
    for whoever asks, and up to ``tokens_per_step`` of those that are fed: a long text delays others by a bounded time.

    Models with recurrent states and those that stream by re-encoding have a cache for each stream, and a forward for
    each, which is not batched.

    Args:
        model: prepared by `sinkattn.enable`.
        max_streams: rows: how many streams are in the memory of the device at once.
        max_parked: how many streams more may be open, parked in host memory.
        max_on_disk: how many streams more than that may be open, parked in files. The host keeps their ids and how
            their tokens are chosen.
        park_folder: an existing folder for these files, which are removed when streams come back, are closed or
            forgotten, and at the end of the process unless it is killed; default: the system's for temporary files.
        tokenizer: for text.
        max_prefix: the most tokens of a prefix; each row has slots for so many sinks. Default: the sinks of `enable`.
        tokens_per_step: the most tokens of a step that are fed rather than generated.
        speculation: a `PromptLookup` or a `DraftModel`, which drafts the next tokens of streams that generate, as many
            at once as turn out right. One forward checks them, so that a stream gets several tokens from it. They are
            those that it would get without, from logits that are equal up to rounding. What can be rolled back is less
            by as many as are drafted at once.
        leads: whether this process alone makes the calls, from any threads, for a model that is spread over ranks: rank
            0 leads the pool, and the others join it (`sinkattn.hf.join_pool`). Such a pool takes no ``max_on_disk``,
            its files are for such pools of as many ranks, and after a forward that failed it cannot go on. Without
            ``leads`` all ranks make the same calls, from one thread.

    Raises:
        TypeError, ValueError: for an invalid argument, or a model that is not enabled; with ``speculation`` also for
            models with recurrent states and those that stream by re-encoding, and if the headroom is too small; with
            ``leads`` for a model in one process, and on another rank than 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_streams: int = 64,
        *,
        max_parked: int = 0,
        max_on_disk: int = 0,
        park_folder: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_prefix: int = 0,
        tokens_per_step: int = 512,
        speculation: Speculation | None = None,
        leads: bool = False,
    ) -> None:
        for name, value, least in (
            ("max_streams", max_streams, 1),
            ("max_parked", max_parked, 0),
            ("max_on_disk", max_on_disk, 0),
            ("max_prefix", max_prefix, 0),
            ("tokens_per_step", tokens_per_step, 1),
        ):
            check_whole(name, value, least)
        folder = None if park_folder is None else Path(park_folder).resolve()
        if folder is not None and not folder.is_dir():
            raise ValueError(f"park_folder: expected a folder, got {folder}")
        self._model = PoolModel(model, tokenizer)
        self._patch = self._model.patch
        self._max_sinks = max(self._patch.layout.num_sinks, max_prefix)
        if leads and max_on_disk:
            raise ValueError(
                f"max_on_disk: expected 0 with leads, as other ranks park nothing on disk, got {max_on_disk}"
            )
        self._leading = LeadingMemory(model, max_streams, self._max_sinks) if leads else None
        self._memory: Memory = self._leading or memory_for(model, max_streams, self._max_sinks)
        self._drafter = None
        if speculation is not None:
            if not self.is_batched:
                raise ValueError(
                    "speculation: expected None, as models with recurrent states and those that stream by re-encoding "
                    f"check no drafts, got {type(speculation).__name__}"
                )
            if leads and isinstance(speculation, DraftModel) and (ranks := num_ranks(speculation.model)) > 1:
                raise ValueError(f"speculation: expected a draft model in one process with leads, got {ranks} ranks")
            self._drafter = drafter_for(
                speculation,
                self._model,
                num_rows=max_streams,
                num_sinks=self._max_sinks,
                tokens_per_step=tokens_per_step,
            )
        engine = Engine(self._memory, max_streams, max_parked, folder, tokens_per_step, model.device, self._drafter)
        self.scheduler = Scheduler(engine, max_streams + max_parked + max_on_disk)
        self._num_rows = max_streams
        if self._leading is not None:
            self._leading.open()

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
            RuntimeError: if the pool is closed.
            TypeError, ValueError: for a prefix longer than ``max_prefix``, or another invalid argument.
        """
        if evict not in ("token", "message"):
            raise ValueError(f"evict: expected 'token' or 'message', got {evict!r}")
        ids = self._model.ids_of("prefix", prefix, is_first=True)
        if len(ids) > self._max_sinks:
            raise ValueError(f"prefix: expected up to {self._max_sinks} tokens (max_prefix), got {len(ids)}")
        num_sinks = max(len(ids), self._patch.layout.num_sinks)
        if evict == "message" and not self.is_batched:
            raise ValueError(
                "evict: expected 'token', as models with recurrent states and those that stream by re-encoding do not "
                "evict whole messages, got 'message'"
            )
        layout = self._patch.layout_with(num_sinks)
        params = SamplingParams() if sampling is None else sampling
        messages = Messages(num_sinks, layout.window, layout.headroom) if evict == "message" else None
        memory = StreamMemory(num_sinks)
        state = StreamState(ids, self._model.new_sampler(params), memory, StreamIds(layout), messages)
        state.begin_anew()
        return self._open(state)

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
            RuntimeError: if the pool is closed.
            OSError: if another stream has to go to disk for it, and cannot.
            ValueError, OSError: as `sinkattn.load_stream`; for a longer prefix than this pool takes; and for a stream
                with logits processors, without ``sampling``.
        """
        self.scheduler.check_room()
        state = saved.load(
            path,
            self._patch,
            self._memory,
            self._model.new_sampler,
            vocabulary=self._model.vocabulary,
            sampling=sampling,
            accept=accept,
        )
        if state.memory.num_sinks > self._max_sinks:
            raise ValueError(
                f"path: num_sinks: expected up to {self._max_sinks} (max_prefix), got {state.memory.num_sinks}"
            )
        return self._open(state)

    def _open(self, state: StreamState) -> Stream:
        self.scheduler.add(state)
        return Stream(self._model, self.scheduler, state)

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer."""
        return self._model.tokenizer

    @property
    def max_prefix(self) -> int:
        """The most tokens of a prefix."""
        return self._max_sinks

    @property
    def is_batched(self) -> bool:
        """Whether streams share forwards, and can evict whole messages: all layers attend over rings."""
        return self._memory.is_batched

    @property
    def num_rows(self) -> int:
        """How many streams are in the memory of the device at once."""
        return self._num_rows

    @property
    def num_rows_in_use(self) -> int:
        """Rows of streams of which something is wanted, rather than kept for later."""
        return sum(state.memory.row is not None and state.is_wanted for state in self.scheduler.streams)

    @property
    def max_open(self) -> int:
        """How many streams may be open, on the device and parked."""
        return self.scheduler.max_open

    def __len__(self) -> int:
        """Streams that are open."""
        return len(self.scheduler)

    def __repr__(self) -> str:
        """The model, how many streams are open, and where they are."""
        places = Counter(state.memory.place for state in self.scheduler.streams)
        where = "".join(f", {place}={places[place]}" for place in ("device", "host", "disk"))
        return f"StreamPool({type(self.model).__name__}, streams={len(self)}{where})"

    def __reduce__(self) -> NoReturn:
        """Refused: threads may wait for a pool, and its streams have handles."""
        raise TypeError("a StreamPool can be neither copied nor pickled; Stream.fork copies a stream")

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device, those of a draft model among them."""
        return self._memory.nbytes + (0 if self._drafter is None else self._drafter.nbytes)

    @property
    def has_failed(self) -> bool:
        """Whether it cannot go on, as one of the ranks that it leads has failed, or this one in their midst."""
        return self._leading is not None and self._leading.has_failed

    def close(self) -> None:
        """Close all streams; no more can be opened. Other ranks, which have joined the pool, leave it."""
        self.scheduler.close()
        if self._leading is not None:
            self._leading.close()

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
