"""`ModelDrafter`: a smaller model goes ahead, in a stream that follows the one that it drafts for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sinkattn.hf.pool.drafts import DraftRequest
from sinkattn.hf.pool.engine import Engine
from sinkattn.hf.pool.state import StreamState


@dataclass
class Follower:
    """A stream of the draft model that has the tokens of another one."""

    state: StreamState
    shift: int
    """Number of a token in the other stream, less its number here, which follow the sinks in both."""

    @property
    def end(self) -> int:
        """Number in the other stream of the token after the last one here."""
        return len(self.state) + self.shift

    def last(self, count: int) -> list[int]:
        """The last ids, up to so many, whose numbers in the other stream are consecutive."""
        ids, queue = self.state.ids, self.state.queue
        first = ids.layout.num_sinks if self.shift else 0
        return [*ids.last(max(0, min(count, len(ids) - first))), *queue]


class ModelDrafter:
    """Drafts what another model would say.

    Each stream is followed by a stream of that model. Before it drafts, it rolls back what the other one has not
    become, and is fed what that has got since.

    Args:
        engine: runs the draft model, in as many rows as the streams that it drafts for have; its memory is batched.
        new_stream: an empty greedy stream with so many sinks.
        num_tokens: the most tokens.
    """

    def __init__(self, engine: Engine, new_stream: Callable[[int], StreamState], num_tokens: int) -> None:
        self._engine, self._new_stream, self.num_tokens = engine, new_stream, num_tokens
        self._followers: dict[StreamState, Follower] = {}

    @property
    def nbytes(self) -> int:
        """See `Drafter`."""
        return self._engine.memory.nbytes

    def drop(self, state: StreamState) -> None:
        """See `Drafter`."""
        if (follower := self._followers.pop(state, None)) is not None:
            self._engine.drop(follower.state)

    def draft(self, requests: Sequence[DraftRequest]) -> list[list[int]]:
        """See `Drafter`."""
        states = [self._following(x) for x in requests]
        drafts = [list[int]() for _ in requests]
        wanted = dict(zip(states, zip(requests, drafts, strict=True), strict=True))
        while working := [x for x, (request, own) in wanted.items() if len(own) < request.most and x.error is None]:
            self._engine.give_rows(working)
            step = self._engine.plan(working)
            for segments in step.forwards:
                self._engine.run(segments)
                self._engine.commit(segments)
            for state, choices in zip(step.sampled, self._engine.choose(step.sampled), strict=True):
                tokens = [choice.token for choice in choices]
                state.queue.extend(tokens)
                state.end_choices()
                wanted[state][1].extend(tokens)
        for request in requests:
            if self._followers[request.state].state.error is not None:
                self.drop(request.state)  # the next time another one begins
        return drafts

    def _following(self, request: DraftRequest) -> StreamState:
        """The stream of the draft model, after which the next token is wanted."""
        follower = self._followers.get(request.state)
        if follower is None or not self._follow(follower, request):
            self.drop(request.state)
            follower = self._followers[request.state] = self._begin(request)
        return follower.state

    def _begin(self, request: DraftRequest) -> Follower:
        """A stream with the tokens in sight."""
        target = request.state
        ids = target.ids.in_sight(request.begin, [request.last_id])
        state = self._new_stream(target.memory.num_sinks)
        state.queue.extend(ids.tolist())
        state.wants_token = True
        return Follower(state, len(target.ids) + 1 - len(ids))

    def _follow(self, follower: Follower, request: DraftRequest) -> bool:
        """Give a stream the tokens of the other one; False if that has gone too far."""
        state, target = follower.state, request.state.ids
        count, window = len(target) + 1, target.layout.window
        theirs, own, end = [*target.last(window), request.last_id], follower.last(window), follower.end
        # The last token runs in any case.
        low, high = max(count - len(theirs), end - len(own)), min(count - 1, end)
        if low > high:
            return False
        same = next((token for token in range(low, high) if theirs[token - count] != own[token - end]), high)
        num_waiting = min(end - same, len(state.queue))
        in_memory = end - same - num_waiting
        if in_memory and not self._engine.memory.can_rollback(state.memory, in_memory):
            return False
        for _ in range(num_waiting):
            state.queue.pop()
        if in_memory:
            self._engine.rollback(state, in_memory)
        state.queue.extend(theirs[same - count :])
        return True
