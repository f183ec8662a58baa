"""How `generate` goes on with streams: from new tokens alone, or from all tokens of the streams and more.

All tokens of a conversation are often encoded anew, and are then not quite those that the streams were fed: a template
drops a part of a reply, a tokenizer cuts it otherwise, or beam search returned another hypothesis than the one that is
in the cache. What they have in common is kept, and the rest is fed anew.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.generation.matching import Match, difference_message, match_rows
from sinkattn.hf.inputs import check_positions


class ContinuationPlan(NamedTuple):
    """How a call of `generate` goes on with streams."""

    mask: Tensor
    """Which of its ids are no padding and not in the streams yet, int64 ``[rows, tokens]``."""
    begin: int
    """The first column of its ids that is fed."""
    start: int
    """Column of the streams in which the first id will stand that it generates."""
    carry_out: Callable[[], None]
    """Brings the cache to where this call begins; until then it is left as it is."""


def plan_continuation(
    cache: SinkCache,
    ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    name: str,
    repeats: int,
    new_ids_only: str | None,
    can_replay: bool,
    padding: Tensor | None,
) -> ContinuationPlan:
    """Plan how a call of `generate` goes on with streams that have seen tokens; changes nothing.

    Args:
        cache: the streams. It will have a row for each row of ids and repetition.
        ids: ``[rows, tokens]`` new tokens, or all of the streams; or new embeddings, ``[rows, tokens, hidden]``.
        attention_mask: of ``ids``; or of the past and ``ids``, which says that they are new.
        position_ids: checked.
        name: of the cache among the arguments, for errors.
        repeats: rows that each row of ids becomes (beams, returned sequences).
        new_ids_only: refuse ids that are not new, for what this names feeds all that it is given.
        can_replay: whether ids are all there is; if not, nothing can be fed anew.
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
        matches = match_rows(cache, on_cpu, keep)
    if matches is None:
        cache.check_usable()
        if rows != len(cache.seen):
            raise ValueError(
                f"{name}: holds {len(cache.seen)} streams, got new ids of {rows}; repeat or select its rows first "
                "(batch_repeat_interleave, batch_select_indices), or give all ids of the streams"
            )
        if cache.state.unfed_padding is not None and padding is not None and tokens > 1:
            is_padding = (on_cpu[:, 0] == padding.cpu()).view(rows, -1).all(dim=1)
            keep[:, 0] &= ~(cache.state.unfed_padding[0].cpu() & is_padding)
        seen, first_position = cache.seen.cpu(), cache.seen.cpu().unsqueeze(1)
        plan = ContinuationPlan(keep, 0, cache.tokens_seen + tokens, partial(_repeat, cache, repeats))
    elif new_ids_only is not None:
        raise ValueError(
            f"input_ids: expected the new ids alone, for {new_ids_only} in transformers feeds all that it is given; "
            f"got those of the whole stream ({tokens})"
        )
    else:
        plan, seen = _join(cache, on_cpu, matches, repeats, can_replay)
        first_position = torch.zeros(1, 1, dtype=torch.int64)
    if position_ids is not None:
        positions = first_position + (keep.cumsum(dim=1) - 1).clamp(min=0)
        given = position_ids.shape[-1]
        check_positions(position_ids.cpu(), positions[:, -given:], keep[:, -given:])
    return record_given(cache, plan._replace(mask=plan.mask.to(ids.device, torch.int64)), seen, repeats)


def record_given(cache: SinkCache, plan: ContinuationPlan, seen: Tensor, repeats: int) -> ContinuationPlan:
    """Let a plan note what it gives the streams, which have ``seen`` so many tokens then, int64 ``[rows]``."""

    def carry_out() -> None:
        plan.carry_out()
        after = seen + plan.mask[:, plan.begin :].sum(dim=1).to(seen.device)
        cache.state.last_given = torch.stack((seen, after), dim=1).repeat_interleave(repeats, dim=0)

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
        cache.state.check_past_mask(attention_mask[:, :-tokens])
    return (attention_mask[:, -tokens:] != 0).cpu()


def _repeat(cache: SinkCache, repeats: int) -> None:
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)


def _join(
    cache: SinkCache, ids: Tensor, matches: list[Match], repeats: int, can_replay: bool
) -> tuple[ContinuationPlan, Tensor]:
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
    goes_on = goes_on and cache.can_roll_back(back, rows)
    if not can_replay and (furthest or not goes_on):
        cache.check_usable()
        row = int(back.argmax())
        raise ValueError(
            f"{difference_message(row, matches[row], ids[row])}; with other inputs than ids nothing is fed anew"
        )
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
            cache.roll_back(back_of_rows.to(cache.seen.device))
            cache.state.continue_at(begin, *(x.repeat_interleave(repeats, dim=0) for x in (ids, fed)))
        else:
            cache.reset()

    seen = torch.tensor([match.fed.seen for match in matches]) - back
    return ContinuationPlan(keep & ~fed, begin, tokens, carry_out), seen
