"""`StreamState`: what a pool keeps of each stream."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from torch import Tensor

from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.memory import StreamMemory
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.sampling.grammar import Grammar
from sinkattn.hf.sampling.stream_sampler import StreamSampler


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
    has_logits: bool = False
    """Whether the logits after the last token in memory are known."""
    parked_logits: Tensor | None = None
    """These, while the stream has no row."""
    ready: int | None = None
    """The next token, chosen and not handed out yet; until it is, it does not belong to the stream."""
    before_choice: tuple[int, Grammar | None] | None = None
    """Draws and grammar before ``ready`` was chosen."""
    error: BaseException | None = None
    """Why it cannot go on, for the call that waits."""
    row_since: int = 0
    """Number of the step in which it got its row."""
    last_step: int = 0
    """Number of the last step that ran it."""

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
        return (self.wants_token and self.ready is None and self.can_choose) or (
            self.num_feeding > 0 and bool(self.queue)
        )

    def begin_choice(self) -> None:
        """Note what the choice of a token changes, for `undo_choice`."""
        grammar = self.sampler.grammar
        self.before_choice = self.sampler.draws, None if grammar is None else grammar.fork()

    def undo_choice(self) -> None:
        """Let a choice that has failed, or whose token is not used, leave no trace."""
        if self.before_choice is not None:
            (self.sampler.draws, self.sampler.grammar), self.before_choice = self.before_choice, None

    def drop_ready(self) -> None:
        """Forget the token that was chosen ahead, or why none could be, as if nobody had tried."""
        if self.ready is not None:
            self.ready = None
            self.undo_choice()
        self.error = None

    def window_begin(self, offset: int) -> int:
        """First token that the window of a token may hold; offset 0 is the next one, -1 the last one in memory."""
        return 0 if self.messages is None else self.messages.window_begin(len(self.ids) + offset)
