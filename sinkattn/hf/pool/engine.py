"""`Engine`: the steps of a pool: which streams run, their forwards, and the choice of their next tokens."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sinkattn.hf.pool.chooser import Chooser, Drafted
from sinkattn.hf.pool.disk import OnDisk
from sinkattn.hf.pool.drafts import Drafter, DraftRequest
from sinkattn.hf.pool.memory import Memory, NewTokens, StreamMemory
from sinkattn.hf.pool.segments import Segment, by_forward, next_segment
from sinkattn.hf.pool.state import Choice, StreamState
from sinkattn.hf.pool.transfer import to_device

# Steps for which a stream that has work keeps its row while another one waits for a row.
MIN_STEPS = 32


class Step(NamedTuple):
    """What a step does."""

    forwards: list[list[Segment]]
    sampled: list[StreamState]
    """Streams that get a token after these forwards."""


@contextmanager
def step_modes(device: torch.device) -> Iterator[None]:
    """For a step: without gradients and autocast, whichever thread runs it, as it is one for all streams."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


class Engine:
    """Runs streams in the rows of a memory. Not thread-safe: the pool calls one method at a time.

    Args:
        memory: of the streams.
        num_rows: its rows.
        max_parked: the most streams that are parked in host memory while all rows are in use.
        park_folder: where others are parked; None for the system's folder for temporary files.
        tokens_per_step: the most tokens of a step that are fed rather than generated.
        device: of the model.
        drafter: drafts tokens; its memory must be batched.
    """

    def __init__(
        self,
        memory: Memory,
        num_rows: int,
        max_parked: int,
        park_folder: Path | None,
        tokens_per_step: int,
        device: torch.device,
        drafter: Drafter | None = None,
    ) -> None:
        self.memory = memory
        self._device = device
        self._max_in_memory = num_rows + max_parked
        self._park_folder = park_folder
        self._drafter = drafter
        self._drafted: dict[StreamState, Drafted] = {}
        """Of the streams of the step that runs."""
        self._tokens_per_step = tokens_per_step
        self._rows: list[StreamState | None] = [None] * num_rows
        """The last stream that got each row; it may have lost it since."""
        self._num_steps = 0
        self._chooser = Chooser()
        self._logits: Tensor | None = None
        """Logits after the last token of each row: ``[rows, vocabulary]``; None before the first forward."""

    def drop(self, state: StreamState) -> None:
        """Forget what is in memory of a stream."""
        if self._drafter is not None:
            self._drafter.drop(state)
        self.memory.drop(state.memory)
        state.has_logits, state.parked_logits = False, None

    def fork(self, state: StreamState) -> StreamState:
        """A copy of a stream; nothing is wanted of it, and no token is ready."""
        memory, logits = self.snapshot(state)
        return StreamState(
            state.prefix,
            state.sampler.fork(),
            memory,
            copy.deepcopy(state.ids),
            copy.deepcopy(state.messages),
            queue=state.queue.copy(),
            has_logits=state.has_logits,
            parked_logits=logits,
            last_step=state.last_step,
            notes=copy.deepcopy(state.notes),
        )

    def snapshot(self, state: StreamState) -> tuple[StreamMemory, Tensor | None]:
        """A copy in host memory of what a stream has, and the logits after its last token if they are known.

        Raises OSError if it is on disk and cannot be read.
        """
        if isinstance(state.memory.contents, OnDisk):
            contents, logits = state.memory.contents.read()
            return replace(state.memory, contents=contents), logits if state.has_logits else None
        return self.memory.copy(state.memory), self._logits_on_host(state)

    def rollback(self, state: StreamState, count: int) -> None:
        """Forget the last tokens in memory, which must be possible."""
        self.memory.rollback(state.memory, count)
        state.ids.rollback(count)
        state.has_logits, state.parked_logits = False, None

    def modes(self) -> AbstractContextManager[None]:
        """See `step_modes`."""
        return step_modes(self._device)

    def give_rows(self, streams: Collection[StreamState]) -> None:
        """Give rows to those of all streams that have work and none; others are parked for it.

        Whose row cannot be had, such as if no file can be written or read, has the `StreamState.error`.
        """
        working = sorted((x for x in streams if x.has_work), key=lambda x: x.last_step)
        for state in [x for x in working if x.memory.row is None]:
            try:
                self._bring_in(state, working, streams)
            except Exception as error:
                state.error = error

    def plan(self, working: Iterable[StreamState]) -> Step:
        """Choose what the next step runs of the streams that have work and a row."""
        self._num_steps += 1
        self._drafted = {}
        working = sorted(working, key=lambda x: x.last_step)
        running = [state for state in working if state.memory.row is not None and self._check_usable(state)]
        single = [
            next_segment(state, 1)._replace(num_drafts=self._num_drafts(state))
            for state in running
            if len(state.queue) == 1
        ]
        feeding = self._feeding([state for state in running if len(state.queue) > 1])
        segments = [*single, *feeding]
        fed = {id(x.state): len(x.ids) for x in segments}
        sampled = [x for x in running if x.wants_token and len(x.queue) == fed.get(id(x), 0)]
        for state in (*(x.state for x in segments), *sampled):
            state.last_step = self._num_steps
        if self.memory.is_batched:
            return Step([group for group in (single, feeding) if group], sampled)
        return Step([[segment] for segment in segments], sampled)

    def _num_drafts(self, state: StreamState) -> int:
        """How many tokens may be drafted to follow the one that waits."""
        if self._drafter is None or not state.wants_token:
            return 0
        count = min(state.num_drafts, self._drafter.num_tokens)
        if state.num_left is not None:
            count = min(count, state.num_left - 1)
        if state.messages is not None:
            count = state.messages.run_length(len(state.ids), count + 1) - 1
        return count

    def _with_drafts(self, segments: Sequence[Segment]) -> Sequence[Segment]:
        drafting = [x for x in segments if x.num_drafts]
        if self._drafter is None or not drafting:
            return segments
        requests = [DraftRequest(x.state, x.ids[-1], x.begin, x.num_drafts) for x in drafting]
        drafts = dict(zip((x.state for x in drafting), self._drafter.draft(requests), strict=True))
        return [x._replace(drafts=drafts.get(x.state, ())) for x in segments]

    def _bring_in(self, state: StreamState, working: Sequence[StreamState], streams: Collection[StreamState]) -> None:
        """Give a stream a row, if there is one or another stream can be parked.

        In an order in which an interruption leaves every stream as it was, or parked, or with its row.
        """
        residents = {i: x for i, x in enumerate(self._rows) if x is not None and x.memory.row == i}
        row = next((i for i in range(len(self._rows)) if i not in residents), None)
        victim: StreamState | None = None
        if row is None:
            idle = [x for x in residents.values() if x not in working]
            if idle:
                # One of which nothing is wanted, or else one whose next token is ready: that has been so for longest.
                victim = min(idle, key=_idleness)
            else:
                victim = min(residents.values(), key=lambda x: x.row_since)
                if self._num_steps - victim.row_since < MIN_STEPS:
                    return
            row = _row(victim)
        if state.memory.place != "host":
            self.make_room(streams)  # where an exchange with the disk has left one too many in host memory
        if isinstance(state.memory.contents, OnDisk):
            contents, logits = state.memory.contents.read()
            state.parked_logits = logits if state.has_logits else None
            state.memory.contents = contents
        if victim is not None:
            victim.parked_logits = self._logits_on_host(victim)
            self.memory.park(victim.memory)
        if (logits := state.parked_logits) is not None:
            if self._logits is None:  # of a stream that was loaded
                self._logits = logits.new_zeros(len(self._rows), len(logits), device=self._device)
            self._logits[row].copy_(logits)
        self._rows[row], state.row_since = state, self._num_steps
        self.memory.bring_in(state.memory, row)
        state.parked_logits = None
        with suppress(OSError):  # on a full disk there is room for it now, if this stream has come from there
            self.make_room(streams)

    def make_room(self, streams: Collection[StreamState]) -> None:
        """Let no more of these streams be in memory than may be: the parked ones that are idle for longest go to disk.

        Raises OSError if a file cannot be written; the stream stays in host memory.
        """
        held = [x for x in streams if x.memory.place in ("device", "host")]
        parked = sorted((x for x in held if x.memory.place == "host"), key=_idleness)
        for state in parked[: max(0, len(held) - self._max_in_memory)]:
            state.memory.contents = OnDisk(state.memory.contents, state.parked_logits, self._park_folder)
            state.parked_logits = None
            if self._drafter is not None:
                self._drafter.drop(state)

    def _logits_on_host(self, state: StreamState) -> Tensor | None:
        """The logits after the last token of a stream that is not on disk; None if they are not known."""
        if not state.has_logits or state.memory.row is None:
            return state.parked_logits
        assert self._logits is not None
        return self._logits[state.memory.row].to("cpu", copy=True)

    def _check_usable(self, state: StreamState) -> bool:
        if not self.memory.can_go_on(state.memory, 0):
            state.error = RuntimeError(
                "stream: a forward that failed has overwritten tokens that it sees; reset() begins it anew"
            )
        return state.error is None

    def _feeding(self, states: Sequence[StreamState]) -> list[Segment]:
        """Tokens of streams that are fed: of the one that has waited longest, and of others with about as many."""
        segments: list[Segment] = []
        width = 0
        for state in states:
            segment = next_segment(state, width or self._tokens_per_step)
            width = width or len(segment.ids)
            if 2 * len(segment.ids) >= width and width * (len(segments) + 1) <= self._tokens_per_step:
                segments.append(segment)
        return segments if self.memory.is_batched else segments[:1]

    def run(self, segments: Sequence[Segment]) -> None:
        """Run a forward of a step, or more where drafts are of different number; `commit` ends it."""
        for group in by_forward(self._with_drafts(segments)):
            self._forward(group)

    def _forward(self, segments: Sequence[Segment]) -> None:
        logits = self.memory.run(
            [NewTokens(x.state.memory, [*x.ids, *x.drafts], x.begin, 1 + len(x.drafts)) for x in segments]
        )
        if self._logits is None:
            self._logits = logits.new_zeros(len(self._rows), logits.shape[2])
        last = logits[:, -1]
        if logits.shape[1] > 1:
            last = last.clone()
        for index, x in enumerate(segments):
            if x.drafts:
                last[index] = logits[index, -1 - len(x.drafts)]
                self._drafted[x.state] = Drafted(x.drafts, logits[index, -len(x.drafts) :])
        self._logits.index_copy_(0, self._row_index([x.state for x in segments]), last)

    def commit(self, segments: Sequence[Segment]) -> None:
        """Count the tokens that a forward has run."""
        goals = [(state, ids, len(state.ids), len(state.queue) - len(ids)) for state, ids, *_ in segments]

        def count() -> None:
            for state, ids, begin, num_waiting in goals:
                self.memory.commit(state.memory, begin + len(ids))
                state.ids.write(begin, ids)
                state.has_logits = True
                while len(state.queue) > num_waiting:
                    state.queue.popleft()

        _complete(count)

    def hand_out(self, state: StreamState) -> int:
        """The first token that is ready, which belongs to the stream from now on."""
        (token, _), *rest = state.ready
        begin = len(state.ids)

        def count() -> None:
            if rest:
                self.memory.commit(state.memory, begin + 1)
                state.ids.write(begin, [token])
                state.has_logits, state.parked_logits = False, None
            else:
                state.queue = deque([token])  # nothing waits while tokens are ready
            state.ready = rest

        _complete(count)
        return token

    def choose(self, states: Sequence[StreamState]) -> list[list[Choice]]:
        """Choose the next tokens of streams, which do not belong to the streams yet; see `Chooser`."""
        if not states:
            return []
        assert self._logits is not None
        logits = self._logits.index_select(0, self._row_index(states))
        drafted, self._drafted = self._drafted, {}
        return self._chooser.choose(states, logits, drafted)

    def _row_index(self, states: Sequence[StreamState]) -> Tensor:
        assert self._logits is not None
        return to_device(torch.tensor([_row(state) for state in states]), self._logits.device)


def _complete(change: Callable[[], None]) -> None:
    """Make a change as a whole, whatever interrupts it; what is done already must not be done twice."""
    interruption, is_done = None, False
    while not is_done:
        try:
            change()
            is_done = True
        except KeyboardInterrupt as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _idleness(state: StreamState) -> tuple[bool, int]:
    """Least for the stream that has been idle for longest."""
    return state.is_wanted, state.last_step


def _row(state: StreamState) -> int:
    assert state.memory.row is not None
    return state.memory.row
