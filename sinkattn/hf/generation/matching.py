"""Matches each row of ids passed to `generate` with the row of the cache whose stream it continues.

Ids either repeat a stream and extend it, perhaps with differences, or are new. Which of the two is decided by what they
have in common with the recorded ids of the stream; ids that could be either are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkattn.hf.cache.id_history import common_prefix_length, is_token
from sinkattn.hf.cache.sink_cache import SinkCache

# A common prefix, or a common run elsewhere, of at least this many tokens is no coincidence.
MIN_MATCHING_RUN = 16

# With fewer tokens in common, ids match a stream only if one is a prefix of the other.
MIN_COMMON_TOKENS = 4

# Tokens at the end of a prompt that a chat template may drop once the reply is there.
MAX_DROPPED_PROMPT_TOKENS = 8


@dataclass
class CachedRow:
    """What is recorded of one row of a cache."""

    row: int
    """Index in the batch."""
    seen: int
    """Tokens of its stream."""
    known_numbers: Tensor
    """Numbers of the recorded tokens, int64 ``[n]``, ascending."""
    known_ids: Tensor
    """Their ids, int64 ``[n]``."""
    column_ids: Tensor | None
    """Ids of the recorded columns, padding as in `IdHistory`; None if the batch had no padding."""
    oldest_column: int
    """First recorded column."""
    num_columns: int
    """Columns fed so far."""
    prompt_span: tuple[int, int]
    """Token numbers where the last prompt of `generate` begins and ends."""
    unfed_padding_id: int | None
    """Padding id that `generate` returned last, and did not feed, because the row ended early; else None."""
    is_usable: bool
    """Whether the stream can continue; if not, its last recorded columns may not be in it."""


@dataclass
class Match:
    """What a row of ids has in common with a row of a cache."""

    cached_row: CachedRow
    num_common: int
    """Tokens of their common prefix."""
    feed_from: int
    """First column of the ids after the common prefix."""
    token_mask: Tensor
    """Bool ``[tokens]``, False for padding among the ids."""


def match_rows(cache: SinkCache, ids: Tensor, token_mask: Tensor) -> list[Match] | None:
    """For each row of ids, its match in the cache; None if all rows are new ids.

    ids int64, token_mask bool ``[rows, tokens]``, on the CPU.

    Raises:
        ValueError: a row that could be new or repeat a stream, or rows of both kinds.
    """
    state, history = cache.state, cache.state.history
    assert cache.seen is not None  # the streams are not empty
    seen, num_columns = cache.seen.tolist(), cache.tokens_seen
    column_ids = history.known_columns(num_columns) if history.has_padding else [None] * len(seen)
    prompt_spans = [(0, count) for count in seen]
    if state.last_prompt_span is not None:
        prompt_spans = state.last_prompt_span.tolist()
    unfed_padding_ids: list[int | None] = [None] * len(seen)
    if state.unfed_padding is not None:
        ended_rows, padding_id = state.unfed_padding
        unfed_padding_ids = [padding_id if has_ended else None for has_ended in ended_rows.tolist()]
    rows = [
        CachedRow(
            row=row,
            seen=seen[row],
            known_numbers=known_numbers,
            known_ids=known_ids,
            column_ids=column_ids[row],
            oldest_column=history.oldest_column,
            num_columns=num_columns,
            prompt_span=tuple(prompt_spans[row]),
            unfed_padding_id=unfed_padding_ids[row],
            is_usable=cache.is_usable,
        )
        for row, (known_numbers, known_ids) in enumerate(history.known_tokens(seen))
    ]
    # The row with the same index first: it is taken if several are equally good.
    matches = [_best_match(rows[row : row + 1] + rows, ids[row], token_mask[row]) for row in range(len(ids))]
    # A row of the cache without tokens neither matches nor differs.
    compared = [row for row, match in enumerate(matches) if match.cached_row.seen]
    continues = {row: _continues_stream(matches[row], ids[row], retry=state.generate_interrupted) for row in compared}
    if compared and all(continues.values()):
        return matches
    for row, row_continues in continues.items():
        match = matches[row]
        repeats_prompt = (
            match.feed_from == ids.shape[1]
            and match.num_common == match.cached_row.prompt_span[1]
            and match.num_common >= MIN_COMMON_TOKENS
        )
        is_ambiguous = match.num_common >= MIN_MATCHING_RUN or repeats_prompt or any(continues.values())
        if not row_continues and is_ambiguous:
            raise ValueError(difference_message(row, match, ids[row]))
    return None


def _best_match(rows: list[CachedRow], ids: Tensor, token_mask: Tensor) -> Match:
    """The match with the longest common prefix; the first of equally long ones."""
    best = _match_row(rows[0], ids, token_mask)
    for cached_row in rows[1:]:
        if best.num_common == best.cached_row.seen:
            break
        match = _match_row(cached_row, ids, token_mask)
        if match.num_common > best.num_common:
            best = match
    return best


def _match_row(cached_row: CachedRow, ids: Tensor, token_mask: Tensor) -> Match:
    """Match tokens by number, or by column if the mask does not mask the padding of the cached row."""
    by_token = _match_tokens(cached_row, ids, token_mask)
    seen, num_columns, column_ids = cached_row.seen, cached_row.num_columns, cached_row.column_ids
    # If the mask leaves as many tokens as the row has, they can be matched by number, wherever the padding is.
    if column_ids is None or (cached_row.is_usable and int(token_mask[:num_columns].sum()) == seen):
        return by_token
    columns = torch.arange(cached_row.oldest_column, cached_row.oldest_column + len(column_ids))
    columns = columns[columns < len(ids)]
    recorded = column_ids[: len(columns)]
    was_token = is_token(recorded)
    same = torch.where(was_token, token_mask[columns] & (ids[columns] == recorded), ~token_mask[columns])
    same |= ~was_token & (ids[columns] == ~recorded)  # the padding id is repeated, but not masked
    different = (~same).nonzero()
    first_difference = int(columns[different[0, 0]]) if len(different) else min(num_columns, len(ids))
    token_mask = token_mask.clone()
    token_mask[columns[~was_token & (columns < first_difference)]] = False
    if (
        first_difference == num_columns
        and num_columns + 1 < len(ids)
        and ids[num_columns] == cached_row.unfed_padding_id
    ):
        token_mask[num_columns] = False
    if int(token_mask[:num_columns].sum()) <= seen:
        by_column = _match_tokens(cached_row, ids, token_mask)
    else:
        # Some padding is in columns that are no longer recorded, so count tokens back from the end of the stream.
        num_common = seen - int(is_token(column_ids[max(0, first_difference - cached_row.oldest_column) :]).sum())
        num_same = first_difference - cached_row.oldest_column
        is_enough = num_same >= min(MIN_MATCHING_RUN, len(columns)) > 0
        by_column = Match(cached_row, num_common if is_enough else 0, first_difference, token_mask)
    return by_column if by_column.num_common >= by_token.num_common else by_token


def _match_tokens(cached_row: CachedRow, ids: Tensor, token_mask: Tensor) -> Match:
    columns = token_mask.nonzero().flatten()
    num_common = common_prefix_length(cached_row.known_numbers, cached_row.known_ids, cached_row.seen, ids[columns])
    feed_from = int(columns[num_common]) if num_common < len(columns) else len(ids)
    # The padding id that ended the last call is masked, unless it is the last of the ids: one has to be fed.
    if (
        num_common == cached_row.seen
        and feed_from == cached_row.num_columns < len(ids) - 1
        and ids[feed_from] == cached_row.unfed_padding_id
    ):
        token_mask = token_mask.clone()
        token_mask[feed_from] = False
    return Match(cached_row, num_common, feed_from, token_mask)


def _continues_stream(match: Match, ids: Tensor, *, retry: bool) -> bool:
    """Whether a row of ids repeats a stream, perhaps with differences; if not, its ids are new.

    The last prompt decides: new ids may share a prefix with the stream, such as what a chat template puts before every
    message, but not the whole of that prompt.

    Args:
        match: of the row and a row of the cache.
        ids: int64 ``[tokens]``.
        retry: whether the last `generate` was interrupted, so that its prompt may come once more.
    """
    row, num_common = match.cached_row, match.num_common
    begin, end = row.prompt_span
    if match.feed_from == len(ids):
        # The ids are a prefix of the stream: with a part of the reply, or the same prompt after an interruption.
        # Otherwise they may be the same message once more.
        return num_common > end or (retry and num_common == end)
    if num_common == row.seen or num_common >= max(MIN_COMMON_TOKENS, end):
        return True
    if num_common >= end - MAX_DROPPED_PROMPT_TOKENS and num_common - begin >= MIN_MATCHING_RUN:
        return True
    # An early token was edited: three quarters of the recorded tokens are at the same numbers, ...
    tokens = ids[match.token_mask]
    within = row.known_numbers < len(tokens)
    num_same = int((tokens[row.known_numbers[within]] == row.known_ids[within]).sum())
    if num_same >= max(MIN_COMMON_TOKENS, -(-3 * len(row.known_numbers) // 4)):
        return True
    # ... or the last tokens of the prompt or of the stream are found anywhere.
    min_run = min(MIN_MATCHING_RUN, max(MIN_COMMON_TOKENS, -(-3 * row.seen // 4)))
    return any(
        _contains_run(
            tokens, row.known_ids[(row.known_numbers >= run_end - size) & (row.known_numbers < run_end)], size
        )
        for run_end, size in ((end, MIN_MATCHING_RUN), (row.seen, min_run))
    )


def _contains_run(ids: Tensor, run: Tensor, size: int) -> bool:
    """Whether ``run`` has ``size`` ids and is found in ``ids``, without gaps."""
    return len(run) == size <= len(ids) and bool((ids.unfold(0, size, 1) == run).all(dim=1).any())


def difference_message(row: int, match: Match, ids: Tensor) -> str:
    """Error message that names the first token in which a row of ids differs from the stream."""
    cached_row = match.cached_row
    if match.feed_from == len(ids):
        found = f"row {row} repeats the first {match.num_common} tokens of the stream"
    else:
        known = cached_row.known_ids[cached_row.known_numbers == match.num_common]
        there = int(known) if len(known) and known >= 0 else "an embedding" if len(known) else "not recorded"
        found = f"token {match.num_common} of row {row} is {int(ids[match.feed_from])}, but in the stream it is {there}"
    return (
        f"input_ids: expected only new ids, or all ids of the stream ({cached_row.seen} tokens) and more; {found}; to "
        f"append these ids, pass an attention_mask of ones for all {cached_row.num_columns + len(ids)} tokens; to "
        "replace the stream, call reset() on the cache"
    )
