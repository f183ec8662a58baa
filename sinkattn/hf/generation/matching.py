"""Which row of a cache a row of ids goes on with, and where the two differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkattn.hf.cache.id_history import common_tokens, is_token
from sinkattn.hf.cache.sink_cache import SinkCache

# So many tokens in common, the first ones or others in a row, are no coincidence.
NO_COINCIDENCE = 16


# With fewer, ids go on with a stream only if they end with what it has.
LEAST = 4


# A template may end a prompt with so many tokens that it leaves out when the reply has come.
PROMPT_END = 8


@dataclass
class CachedRow:
    """What is known of one row of a cache."""

    row: int
    seen: int
    """Tokens, without padding."""
    numbers: Tensor
    """Which are known, int64 ``[n]``."""
    ids: Tensor
    """Their ids, int64 ``[n]``."""
    columns: Tensor | None
    """What the columns in sight brought, as in `IdHistory`; None without padding."""
    oldest: int
    """The first of them."""
    end: int
    """Columns in all."""
    given: tuple[int, int]
    """Tokens before and after what `generate` was last given."""
    pending: int | None
    """The padding that it was given as its last id, if it ended before other rows; it has not been fed."""
    usable: bool
    """It has seen what its columns say."""


@dataclass
class Match:
    """What a row of ids has in common with a row of a cache."""

    fed: CachedRow
    common: int
    """Tokens of the stream that the ids begin with."""
    begin: int
    """First column of the ids that is not in common."""
    keep: Tensor
    """Which ids are no padding, bool ``[tokens]``."""


def match_rows(cache: SinkCache, ids: Tensor, keep: Tensor) -> list[Match] | None:
    """For each row of ids the row of the cache that it goes on with; None if they are all new.

    Raises:
        ValueError: neither.
    """
    state, history = cache.state, cache.state.history
    seen, end = cache.seen.tolist(), cache.tokens_seen
    columns = history.known_columns(end) if history.padded else [None] * len(seen)
    given = [(0, count) for count in seen] if state.last_given is None else state.last_given.tolist()
    pending: list[int | None] = [None] * len(seen)
    if state.unfed_padding is not None:
        ended, padding = state.unfed_padding
        pending = [padding if has_ended else None for has_ended in ended.tolist()]
    rows = [
        CachedRow(
            row, seen[row], *tokens, columns[row], history.oldest, end, tuple(given[row]), pending[row], cache.usable
        )
        for row, tokens in enumerate(history.known_tokens(seen))
    ]
    matches = [_best(rows[row : row + 1] + rows, ids[row], keep[row]) for row in range(len(ids))]
    # A row without any token has nothing to go on with or to differ from.
    judged = [row for row, match in enumerate(matches) if match.fed.seen]
    whole = {row: _goes_on(matches[row], ids[row], retried=state.interrupted) for row in judged}
    if judged and all(whole.values()):
        return matches
    for row, is_whole in whole.items():
        match = matches[row]
        repeated = match.begin == ids.shape[1] and match.common == match.fed.given[1] and match.common >= LEAST
        if not is_whole and (match.common >= NO_COINCIDENCE or repeated or any(whole.values())):
            raise ValueError(difference_message(row, match, ids[row]))
    return None


def _best(rows: list[CachedRow], ids: Tensor, keep: Tensor) -> Match:
    """The best match among rows of a cache; the first of those that are equally good."""
    best = None
    for fed in rows:
        match = _match(fed, ids, keep)
        if best is None or match.common > best.common:
            best = match
        if best.common == best.fed.seen:
            break
    return best


def _match(fed: CachedRow, ids: Tensor, keep: Tensor) -> Match:
    by_token = _match_tokens(fed, ids, keep)
    # A mask that leaves out as much as the row had padding is right, wherever that stands.
    if fed.columns is None or (fed.usable and int(keep[: fed.end].sum()) == fed.seen):
        return by_token
    in_sight = torch.arange(fed.oldest, fed.oldest + len(fed.columns))
    in_sight = in_sight[in_sight < len(ids)]
    brought = fed.columns[: len(in_sight)]
    same = torch.where(is_token(brought), keep[in_sight] & (ids[in_sight] == brought), ~keep[in_sight])
    same |= ~is_token(brought) & (ids[in_sight] == ~brought)
    different = (~same).nonzero()
    aligned = int(in_sight[different[0, 0]]) if len(different) else min(fed.end, len(ids))
    without = keep.clone()
    without[in_sight[~is_token(brought) & (in_sight < aligned)]] = False
    if aligned == fed.end and fed.end + 1 < len(ids) and ids[fed.end] == fed.pending:
        without[fed.end] = False
    if int(without[: fed.end].sum()) <= fed.seen:
        by_column = _match_tokens(fed, ids, without)
    else:
        # There was padding in columns that nobody knows any more: what is in sight decides, counted from its end.
        common = fed.seen - int(is_token(fed.columns[max(0, aligned - fed.oldest) :]).sum())
        enough = aligned - fed.oldest >= min(NO_COINCIDENCE, len(in_sight)) > 0
        by_column = Match(fed, common if enough else 0, aligned, without)
    return by_column if by_column.common >= by_token.common else by_token


def _match_tokens(fed: CachedRow, ids: Tensor, keep: Tensor) -> Match:
    own = keep.nonzero().flatten()
    common = common_tokens(fed.numbers, fed.ids, fed.seen, ids[own])
    begin = int(own[common]) if common < len(own) else len(ids)
    # Unless nothing follows: then the row is asked to go on with it.
    if common == fed.seen and begin == fed.end < len(ids) - 1 and ids[begin] == fed.pending:
        keep = keep.clone()
        keep[begin] = False
    return Match(fed, common, begin, keep)


def _goes_on(match: Match, ids: Tensor, *, retried: bool) -> bool:
    """Whether a row of ids is all of a stream, up to a difference; if not it is new.

    What was last given decides: new ids may begin as a stream did, with what a template puts before every message, but
    have no more than that in common with it.
    """
    fed, common = match.fed, match.common
    begin, end = fed.given
    if match.begin == len(ids):
        # A reply that was cut short; or a call that was interrupted, once more. Else the same message may come again.
        return common > end or (retried and common == end)
    if common == fed.seen or common >= max(LEAST, end):
        return True
    if common >= end - PROMPT_END and common - begin >= NO_COINCIDENCE:
        return True
    # An early token was edited, but most are where they were, or the last ones are there, perhaps at other places.
    own = ids[match.keep]
    most = -(-3 * fed.seen // 4)
    within = fed.numbers < len(own)
    if int((own[fed.numbers[within]] == fed.ids[within]).sum()) >= max(LEAST, -(-3 * len(fed.numbers) // 4)):
        return True
    tails = ((end, NO_COINCIDENCE), (fed.seen, min(NO_COINCIDENCE, max(LEAST, most))))
    return any(
        _contains(own, fed.ids[(fed.numbers >= last - size) & (fed.numbers < last)], size) for last, size in tails
    )


def _contains(ids: Tensor, part: Tensor, size: int) -> bool:
    """Whether ``part``, if that is ``size`` ids, is found among ids in a row."""
    return len(part) == size <= len(ids) and bool((ids.unfold(0, size, 1) == part).all(dim=1).any())


def difference_message(row: int, match: Match, ids: Tensor) -> str:
    """Error message that names the first token in which a row of ids differs from the stream."""
    fed = match.fed
    if match.begin == len(ids):
        what = f"row {row} is the first {match.common} tokens of the stream again"
    else:
        known = fed.ids[fed.numbers == match.common]
        there = int(known) if len(known) and known >= 0 else "an embedding" if len(known) else "not there"
        what = f"token {match.common} of row {row} is {int(ids[match.begin])}, and that of the stream {there}"
    return (
        f"input_ids: expected new ids, or all of the stream ({fed.seen} tokens) and more; {what}; if they are meant to "
        f"come again, give an attention_mask of ones for all {fed.end + len(ids)} tokens, and if they are meant to "
        "replace the stream, call reset() on the cache"
    )
