"""`StreamState`: what a pool keeps of each stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.memory import StreamMemory
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.sampling.grammar import Grammar
from sinkattn.hf.sampling.stream_sampler import StreamSampler


class SamplerState(NamedTuple):
    """What the choice of a token changes."""

    draws: int
    grammar: Grammar | None


class Choice(NamedTuple):
    """A token that was chosen."""

    token: int
    before: SamplerState


@dataclass(eq=False)
class StreamState:
    """A stream: its tokens in memory, those that wait, and what is wanted of it."""

    prefix: list[int]
    sampler: StreamSampler
    memory: StreamMemory
    ids: StreamIds
    """Ids of the tokens in memory."""
    messages: Messages | None
    """Where messages begin; None if tokens are evicted one by one."""

    queue: deque[int] = field(default_factory=deque)
    """Tokens of the stream that are not in memory yet."""
    num_feeding: int = 0
    """Calls of `feed` that wait until all tokens are in memory."""
    wants_token: bool = False
    """Whether somebody wants the next token, or will when the one before has been used."""
    generation: object | None = None
    """The call of `generate` that runs."""
    num_left: int | None = None
    """How many more tokens it takes; None for no limit."""
    num_drafts: int = 1
    """How many tokens are drafted next, up to the limit of the pool."""
    has_logits: bool = False
    """Whether the logits after the last token in memory are known."""
    parked_logits: Tensor | None = None
    """These, while the stream has no row."""
    ready: Sequence[Choice] = ()
    """The next tokens, chosen and not handed out yet; until they are, they do not belong to the stream.

    All but the last are in memory, where they do not count.
    """
    before_choices: SamplerState | None = None
    """From before what a step that has not ended has chosen."""
    error: BaseException | None = None
    """Why it cannot go on, for the call that waits."""
    row_since: int = 0
    """Number of the step in which it got its row."""
    last_step: int = 0
    """Number of the last step that ran it."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Of whoever uses it; see `Stream.notes`."""

    def __len__(self) -> int:
        """Tokens of the stream, those that wait among them."""
        return len(self.ids) + len(self.queue)

    def begin_anew(self) -> None:
        """Go back to the prefix; nothing is in memory any more."""
        self.ids = StreamIds(self.ids.layout)
        self.messages = None if self.messages is None else self.messages.emptied()
        self.queue.clear()
        self.queue.extend(self.prefix)
        self.begin_text()

    def begin_text(self) -> None:
        """Let the next token begin a text of the grammar, if there is one."""
        if self.sampler.grammar is not None:
            self.sampler.grammar.begin_anew()

    @property
    def is_text_complete(self) -> bool:
        """Whether the grammar, if there is one, is at the end of a text."""
        return self.sampler.grammar is not None and self.sampler.grammar.is_complete

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it, or will."""
        return self.wants_token or self.num_feeding > 0

    @property
    def can_choose(self) -> bool:
        """Whether the next token can be chosen: now, or after those that wait."""
        return self.has_logits or bool(self.queue)

    @property
    def has_work(self) -> bool:
        """Whether a step can bring it nearer to what is wanted."""
        if self.error is not None:
            return False
        return (self.wants_token and not self.ready and self.can_choose) or (self.num_feeding > 0 and bool(self.queue))

    def begin_choice(self) -> SamplerState:
        """What the choice of a token changes, for `undo_choice`."""
        grammar = self.sampler.grammar
        before = SamplerState(self.sampler.draws, None if grammar is None else grammar.fork())
        if self.before_choices is None:
            self.before_choices = before
        return before

    def undo_choice(self, before: SamplerState) -> None:
        """Let a choice that has failed, or whose token is not used, leave no trace."""
        self.sampler.draws, self.sampler.grammar = before
        if self.before_choices is before:
            self.before_choices = None

    def end_choices(self) -> None:
        """End those of a step, which leave no trace if their tokens are not ready."""
        if self.before_choices is not None and not self.ready:
            self.undo_choice(self.before_choices)
        self.before_choices = None

    def note_drafts(self, count: int, num_right: int) -> None:
        """Draft twice as many the next time if all that were drafted are right, else as many as are."""
        self.num_drafts = max(self.num_drafts, 2 * count) if num_right == count else max(1, num_right)

    def drop_ready(self) -> None:
        """Forget the tokens that were chosen ahead, or why none could be, as if nobody had tried."""
        if self.ready:
            before, self.ready = self.ready[0].before, ()
            self.undo_choice(before)
        self.error = None

    def window_begin(self, offset: int) -> int:
        """First token that the window of a token may hold; offset 0 is the next one, -1 the last one in memory."""
        return 0 if self.messages is None else self.messages.window_begin(len(self.ids) + offset)
