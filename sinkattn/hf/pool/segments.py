"""`Segment`: what a step runs of a stream, and which of them share a forward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from sinkattn.hf.pool.state import StreamState


class Segment(NamedTuple):
    """Tokens of a stream that a step runs."""

    state: StreamState
    ids: list[int]
    begin: int
    """First token that their window may hold."""
    num_drafts: int = 0
    """The most tokens that may be drafted to follow them."""
    drafts: Sequence[int] = ()
    """These, which run with them and do not count."""

    def length(self) -> int:
        """Tokens that run."""
        return len(self.ids) + len(self.drafts)


def next_segment(state: StreamState, most: int) -> Segment:
    """The next tokens of a stream, up to ``most``, whose windows begin with the same message."""
    count = min(most, len(state.queue))
    if state.messages is not None:
        count = state.messages.run_length(len(state.ids), count)
    return Segment(state, [*islice(state.queue, count)], state.window_begin(0))


def by_forward(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by forward: at most half of the tokens of each are padding."""
    groups: list[list[Segment]] = []
    total = width = 0
    for segment in sorted(segments, key=Segment.length, reverse=True):
        total += segment.length()
        if not groups or width * (len(groups[-1]) + 1) > 2 * total:
            groups.append([])
            total = width = segment.length()
        groups[-1].append(segment)
    return groups
