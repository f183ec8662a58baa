"""How `generate` goes on with streams: from new tokens alone, or from all tokens of the streams and more.

All tokens of a conversation are often encoded anew, and are then not quite those that the streams were fed: a template
drops a part of a reply, a tokenizer cuts it otherwise, or beam search returned another hypothesis than the one that is
in the cache. What they have in common is kept, and the rest is fed anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sinkattn.hf.cache import SinkCache
from sinkattn.hf.id_history import common_tokens, is_token
from sinkattn.hf.inputs import check_positions

# So many tokens in common, the first ones or others in a row, are no coincidence.
NO_COINCIDENCE = 16
# With fewer, ids go on with a stream only if they end with what it has.
LEAST = 4
# A template may end a prompt with so many tokens that it leaves out when the reply has come.
PROMPT_END = 8


class Plan(NamedTuple):
    """How a call of `generate` goes on with streams."""

    mask: Tensor
    """Which of its ids are no padding and not in the streams yet, int64 ``[rows, tokens]``."""
    begin: int
    """The first column of its ids that is fed."""
    start: int
    """Column of the streams in which the first id will stand that it generates."""
    carry_out: Callable[[], None]
    """Brings the cache to where this call begins; until then it is left as it is."""


@dataclass
class Fed:
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

    fed: Fed
    common: int
    """Tokens of the stream that the ids begin with."""
    begin: int
    """First column of the ids that is not in common."""
    keep: Tensor
    """Which ids are no padding, bool ``[tokens]``."""


def go_on(
    cache: SinkCache,
    ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    name: str,
    repeats: int,
    new_alone: str | None,
    mendable: bool,
    padding: Tensor | None,
) -> Plan:
    """Plan how a call of `generate` goes on with streams that have seen tokens; changes nothing.

    Args:
        cache: the streams. It will have a row for each row of ids and repetition.
        ids: ``[rows, tokens]`` new tokens, or all of the streams; or new embeddings, ``[rows, tokens, hidden]``.
        attention_mask: of ``ids``; or of the past and ``ids``, which says that they are new.
        position_ids: checked.
        name: of the cache among the arguments, for errors.
        repeats: rows that each row of ids becomes (beams, returned sequences).
        new_alone: refuse ids that are not new, for what this names feeds all that it is given.
        mendable: whether ids are all there is; if not, nothing can be fed anew.
        padding: what `generate` gave rows that ended, as it comes in ``ids``: an id, or an embedding.

    Raises:
        ValueError: ids that can neither be new nor those of the streams, saying which token differs.
        RuntimeError: streams that cannot go on.
    """
    rows, tokens = ids.shape[:2]
    keep = _mask(attention_mask, cache, rows, tokens)
    cache.check_padding(keep)
    on_cpu = ids.cpu()
    matches = None
    if ids.ndim == 2 and (attention_mask is None or attention_mask.shape[1] == tokens):
        matches = _matches(cache, on_cpu, keep)
    if matches is None:
        cache.check_usable()
        if rows != len(cache.seen):
            raise ValueError(
                f"{name}: holds {len(cache.seen)} streams, got new ids of {rows}; repeat or select its rows first "
                "(batch_repeat_interleave, batch_select_indices), or give all ids of the streams"
            )
        if cache.streams.pending is not None and padding is not None and tokens > 1:
            is_padding = (on_cpu[:, 0] == padding.cpu()).view(rows, -1).all(dim=1)
            keep[:, 0] &= ~(cache.streams.pending[0].cpu() & is_padding)
        seen, first_position = cache.seen.cpu(), cache.seen.cpu().unsqueeze(1)
        plan = Plan(keep, 0, cache.tokens_seen + tokens, partial(_repeat, cache, repeats))
    elif new_alone is not None:
        raise ValueError(
            f"input_ids: expected the new ids alone, for {new_alone} in transformers feeds all that it is given; got "
            f"those of the whole stream ({tokens})"
        )
    else:
        plan, seen = _join(cache, on_cpu, matches, repeats, mendable)
        first_position = torch.zeros(1, 1, dtype=torch.int64)
    if position_ids is not None:
        positions = first_position + (keep.cumsum(dim=1) - 1).clamp(min=0)
        given = position_ids.shape[-1]
        check_positions(position_ids.cpu(), positions[:, -given:], keep[:, -given:])
    return note_given(cache, plan._replace(mask=plan.mask.to(ids.device, torch.int64)), seen, repeats)


def note_given(cache: SinkCache, plan: Plan, seen: Tensor, repeats: int) -> Plan:
    """Let a plan note what it gives the streams, which have ``seen`` so many tokens then, int64 ``[rows]``."""

    def carry_out() -> None:
        plan.carry_out()
        after = seen + plan.mask[:, plan.begin :].sum(dim=1).to(seen.device)
        cache.streams.given = torch.stack((seen, after), dim=1).repeat_interleave(repeats, dim=0)

    return plan._replace(carry_out=carry_out)


def _mask(attention_mask: Tensor | None, cache: SinkCache, rows: int, tokens: int) -> Tensor:
    """Which of the ids are no padding: bool ``[rows, tokens]``, on the CPU."""
    if attention_mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool)
    past = cache.tokens_seen
    if tuple(attention_mask.shape) not in ((rows, tokens), (rows, past + tokens)):
        raise ValueError(
            f"attention_mask: expected {[rows, tokens]}, or {[rows, past + tokens]} with the past, got "
            f"{list(attention_mask.shape)}"
        )
    if rows == len(cache.seen):
        cache.check_past(attention_mask[:, :-tokens])
    return (attention_mask[:, -tokens:] != 0).cpu()


def _repeat(cache: SinkCache, repeats: int) -> None:
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)


def _matches(cache: SinkCache, ids: Tensor, keep: Tensor) -> list[Match] | None:
    """For each row of ids the row of the cache that it goes on with; None if they are all new.

    Raises:
        ValueError: neither.
    """
    streams, history = cache.streams, cache.streams.history
    seen, end = cache.seen.tolist(), cache.tokens_seen
    columns = history.known_columns(end) if history.padded else [None] * len(seen)
    given = [(0, count) for count in seen] if streams.given is None else streams.given.tolist()
    pending: list[int | None] = [None] * len(seen)
    if streams.pending is not None:
        ended, padding = streams.pending
        pending = [padding if has_ended else None for has_ended in ended.tolist()]
    rows = [
        Fed(row, seen[row], *tokens, columns[row], history.oldest, end, tuple(given[row]), pending[row], cache.usable)
        for row, tokens in enumerate(history.known_tokens(seen))
    ]
    matches = [_best(rows[row : row + 1] + rows, ids[row], keep[row]) for row in range(len(ids))]
    # A row without any token has nothing to go on with or to differ from.
    judged = [row for row, match in enumerate(matches) if match.fed.seen]
    whole = {row: _goes_on(matches[row], ids[row], retried=streams.interrupted) for row in judged}
    if judged and all(whole.values()):
        return matches
    for row, is_whole in whole.items():
        match = matches[row]
        repeated = match.begin == ids.shape[1] and match.common == match.fed.given[1] and match.common >= LEAST
        if not is_whole and (match.common >= NO_COINCIDENCE or repeated or any(whole.values())):
            raise ValueError(_difference(row, match, ids[row]))
    return None


def _best(rows: list[Fed], ids: Tensor, keep: Tensor) -> Match:
    """The best match among rows of a cache; the first of those that are equally good."""
    best = None
    for fed in rows:
        match = _match(fed, ids, keep)
        if best is None or match.common > best.common:
            best = match
        if best.common == best.fed.seen:
            break
    return best


def _match(fed: Fed, ids: Tensor, keep: Tensor) -> Match:
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


def _match_tokens(fed: Fed, ids: Tensor, keep: Tensor) -> Match:
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


def _difference(row: int, match: Match, ids: Tensor) -> str:
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


def _join(cache: SinkCache, ids: Tensor, matches: list[Match], repeats: int, mendable: bool) -> tuple[Plan, Tensor]:
    """Plan for all ids of the streams; returns tokens of each row that are not fed anew, too, int64 ``[rows]``."""
    tokens = ids.shape[1]
    keep, begins, back = torch.stack([match.keep for match in matches]), [], []
    for match in matches:
        begin, common = match.begin, match.common
        if begin == tokens:  # there has to be something to feed
            begin, common = begin - 1, common - 1
        begins.append(begin)
        back.append(match.fed.seen - common)
    begins, back = torch.tensor(begins), torch.tensor(back)
    rows = torch.tensor([match.fed.row for match in matches])
    furthest = int(back.max())
    # States can neither go back nor leave out what they have had.
    goes_on = cache.usable and not (cache.has_states and (furthest or len(set(begins.tolist())) > 1))
    goes_on = goes_on and cache.can_take_back(back, rows)
    if not mendable and (furthest or not goes_on):
        cache.check_usable()
        row = int(back.argmax())
        raise ValueError(f"{_difference(row, matches[row], ids[row])}; with other inputs than ids nothing is fed anew")
    begin = int(begins.min()) if goes_on else 0
    if not goes_on:
        remedy = ""
        if cache.usable and not cache.has_states:
            remedy = f"; sinkattn.enable(model, ..., headroom={furthest}) would have spared that"
        warnings.warn(
            f"all {tokens} tokens are fed anew, for they differ from those of the stream{remedy}",
            RuntimeWarning,
            stacklevel=4,
        )
        begins, back = torch.zeros_like(begins), torch.tensor([match.fed.seen for match in matches])
    fed = keep & (torch.arange(tokens) < begins.unsqueeze(1))
    rows, back_of_rows = rows.repeat_interleave(repeats), back.repeat_interleave(repeats)

    def carry_out() -> None:
        if rows.tolist() != list(range(len(cache.seen))):
            cache.batch_select_indices(rows)
        if goes_on:
            cache.take_back(back_of_rows.to(cache.seen.device))
            cache.continue_at(begin, *(x.repeat_interleave(repeats, dim=0) for x in (ids, fed)))
        else:
            cache.reset()

    seen = torch.tensor([match.fed.seen for match in matches]) - back
    return Plan(keep & ~fed, begin, tokens, carry_out), seen


def follow(
    cache: SinkCache,
    generated: Tensor,
    lengths: Tensor,
    start: int,
    beams: int,
    feed: Callable[[Tensor, Tensor], None],
) -> None:
    """Make the rows of a cache those of the hypotheses that beam search returned: it leaves those it was at.

    Args:
        cache: ``prompts * beams`` rows; ``prompts * returned`` afterwards.
        generated: ``[prompts * returned, tokens]`` what was returned after the prompt, padded.
        lengths: int64 ``[prompts * returned]`` how many of them are no padding.
        start: column of the first of them.
        beams: rows for each prompt.
        feed: called with ids and mask, ``[rows, tokens]``, to feed them.
    """
    generated, lengths = generated.cpu(), lengths.cpu()
    fed, seen = cache.tokens_seen - start, cache.seen.tolist()
    known = cache.streams.history.known_tokens(seen)
    returned = len(generated) * beams // len(seen)
    source, same = [], []
    for row, ids in enumerate(generated):
        group = range(row // returned * beams, (row // returned + 1) * beams)
        common = []
        for other in group:
            # All that was fed since is in every row.
            begin = seen[other] - fed
            numbers, tokens = (x[known[other][0] >= begin] for x in known[other])
            common.append(common_tokens(numbers - begin, tokens, fed, ids[: lengths[row]]))
        same.append(max(common))
        source.append(group[common.index(max(common))])
    # All but the last id are fed, as always after generate.
    end = generated.shape[1] - 1
    begin = min(*same, end)
    keep = torch.arange(generated.shape[1]) < lengths.unsqueeze(1)
    if source != list(range(len(seen))):
        cache.batch_select_indices(torch.tensor(source))
    try:
        cache.crop(begin - fed)
    except RuntimeError:
        cache.refuse(
            f"beam search returned other hypotheses than those that it was at, which differ {fed - begin} tokens back; "
            "give generate all ids of the streams, or enable the model with as much headroom",
            start + begin,
            generated[:, begin:end],
            keep[:, begin:end],
        )
    else:
        if begin < end:
            feed(generated[:, begin:end], keep[:, begin:end])
    cache.note_ended(lengths <= end, generated[:, end])
