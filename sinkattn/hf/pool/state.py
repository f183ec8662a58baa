"""`StreamState`: what a pool keeps of each stream."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.memory import StreamMemory
from sinkattn.hf.pool.messages import Messages
from sinkattn.hf.sampling.grammar import Grammar
from sinkattn.hf.sampling.stream_sampler import StreamSampler

Wanted = Literal["nothing", "feed", "token"]
"""What somebody waits for: nothing, that all tokens are in memory, or the next token."""


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
    wanted: Wanted = "nothing"
    generation: object | None = None
    """The call of `generate` that runs."""
    has_logits: bool = False
    """Whether the logits after the last token in memory are known."""
    parked_logits: Tensor | None = None
    """These, while the stream has no row."""
    ready: int | None = None
    """The next token, chosen and not handed out yet; until it is, it does not belong to the stream."""
    grammar_before: Grammar | None = None
    """The grammar before ``ready``."""
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

    @property
    def has_work(self) -> bool:
        """Whether a step can bring it nearer to what is wanted."""
        if self.error is not None:
            return False
        return self.ready is None if self.wanted == "token" else self.wanted == "feed" and bool(self.queue)

    def drop_ready(self) -> None:
        """Forget the token that was chosen ahead, as if it had not been chosen."""
        if self.ready is None:
            return
        self.ready = None
        if not self.sampler.params.is_greedy:
            self.sampler.draws -= 1
        self.sampler.grammar, self.grammar_before = self.grammar_before, None

    def window_begin(self, offset: int) -> int:
        """First token that the window of a token may hold; offset 0 is the next one, -1 the last one in memory."""
        return 0 if self.messages is None else self.messages.window_begin(len(self.ids) + offset)
