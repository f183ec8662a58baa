"""Plans how `generate` continues streams: from only new ids, or from all ids of the streams and more.

A conversation that is tokenized again often differs from what the streams were fed: a chat template drops a part of a
reply, the tokenizer splits it differently, or beam search returned another hypothesis than the cache holds. The common
prefix is kept, and the rest is fed again. `matching` finds the common prefix.
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
    """How a call of `generate` continues streams."""

    mask: Tensor
    """Token mask of its ids that leaves out those in the streams already, int64 ``[rows, tokens]``."""
    feed_from: int
    """First column of its ids to feed."""
    generated_from: int
    """Column of the streams that the first generated id will have."""
    update_cache: Callable[[], None]
    """Brings the cache to where this call continues it; nothing is changed until then."""


def plan_continuation(
    cache: SinkCache,
    ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    cache_name: str,
    repeats: int,
    needs_new_ids: str | None,
    can_prefill_again: bool,
    unfed_padding: Tensor | None,
) -> ContinuationPlan:
    """Plan how a call of `generate` continues streams that are not empty; changes nothing.

    Args:
        cache: the streams. The plan repeats its rows, so that it has ``repeats`` rows for each row of ids.
        ids: ``[rows, tokens]``, only new ids or all ids of the streams; or ``[rows, tokens, hidden]``, new embeddings.
        attention_mask: of ``ids``; or of the past columns and ``ids``, which are new ids then.
        position_ids: checked against the positions of the plan.
        cache_name: name of the cache argument, for error messages.
        repeats: rows of the cache for each row of ids (beams, returned sequences).
        needs_new_ids: name of an option of the call that works only with new ids; None if there is none.
        can_prefill_again: whether all ids may be fed again after a reset.
        unfed_padding: the padding of ``SharedCacheState.unfed_padding``, as an id or an embedding like ``ids``.

    Raises:
        ValueError: ids that could be new or those of the streams, naming the token that differs.
        RuntimeError: the streams cannot continue.
    """
    assert cache.seen is not None  # the streams are not empty
    rows, tokens = ids.shape[:2]
    token_mask = _input_mask(attention_mask, cache, rows, tokens)
    cache.check_padding(token_mask)
    ids_on_cpu = ids.cpu()
    matches: list[Match] | None = None
    if ids.ndim == 2 and (attention_mask is None or attention_mask.shape[1] == tokens):
        matches = match_rows(cache, ids_on_cpu, token_mask)
    if matches is None:
        cache.check_usable()
        if rows != len(cache.seen):
            raise ValueError(
                f"{cache_name}: holds {len(cache.seen)} streams, got new ids of {rows}; repeat or select its rows "
                "first (batch_repeat_interleave, batch_select_indices), or pass all ids of the streams"
            )
        if cache.state.unfed_padding is not None and unfed_padding is not None and tokens > 1:
            is_padding = (ids_on_cpu[:, 0] == unfed_padding.cpu()).view(rows, -1).all(dim=1)
            token_mask[:, 0] &= ~(cache.state.unfed_padding[0].cpu() & is_padding)
        seen, first_position = cache.seen.cpu(), cache.seen.cpu().unsqueeze(1)
        plan = ContinuationPlan(token_mask, 0, cache.tokens_seen + tokens, partial(_repeat_rows, cache, repeats))
    elif needs_new_ids is not None:
        raise ValueError(
            f"input_ids: expected only new ids, because {needs_new_ids} in transformers feeds all ids that it gets, "
            f"got those of the whole stream ({tokens})"
        )
    else:
        plan, seen = _plan_full_sequences(cache, ids_on_cpu, matches, repeats, can_prefill_again)
        first_position = torch.zeros(1, 1, dtype=torch.int64)
    if position_ids is not None:
        positions = first_position + (token_mask.cumsum(dim=1) - 1).clamp(min=0)
        num_positions = position_ids.shape[-1]
        check_positions(position_ids.cpu(), positions[:, -num_positions:], token_mask[:, -num_positions:])
    return record_prompt_span(cache, plan._replace(mask=plan.mask.to(ids.device, torch.int64)), seen, repeats)


def record_prompt_span(cache: SinkCache, plan: ContinuationPlan, seen: Tensor, repeats: int) -> ContinuationPlan:
    """The plan, with an update that also records the prompt's span; its rows begin at ``seen``, int64 ``[rows]``."""

    def update_cache() -> None:
        plan.update_cache()
        end = seen + plan.mask[:, plan.feed_from :].sum(dim=1).to(seen.device)
        cache.state.last_prompt_span = torch.stack((seen, end), dim=1).repeat_interleave(repeats, dim=0)

    return plan._replace(update_cache=update_cache)


def _input_mask(attention_mask: Tensor | None, cache: SinkCache, rows: int, tokens: int) -> Tensor:
    """Token mask of the ids, bool ``[rows, tokens]``, on the CPU; checks the mask of past columns if there is one."""
    if attention_mask is None:
        return torch.ones(rows, tokens, dtype=torch.bool)
    past = cache.tokens_seen
    if tuple(attention_mask.shape) not in ((rows, tokens), (rows, past + tokens)):
        raise ValueError(
            f"attention_mask: expected {[rows, tokens]}, or {[rows, past + tokens]} with the past, got "
            f"{list(attention_mask.shape)}"
        )
    if cache.seen is not None and rows == len(cache.seen):
        cache.state.check_past_mask(attention_mask[:, :-tokens])
    return (attention_mask[:, -tokens:] != 0).cpu()


def _repeat_rows(cache: SinkCache, repeats: int) -> None:
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)


def _plan_full_sequences(
    cache: SinkCache, ids: Tensor, matches: list[Match], repeats: int, can_prefill_again: bool
) -> tuple[ContinuationPlan, Tensor]:
    """Plan for all ids of the streams and more: rolls back what differs, or resets the cache if it cannot.

    Returns the plan, and the tokens of each row that are kept, int64 ``[rows]``.
    """
    tokens = ids.shape[1]
    token_mask = torch.stack([match.token_mask for match in matches])
    first_columns, counts = [], []
    for match in matches:
        column, num_common = match.feed_from, match.num_common
        if column == tokens:  # feed at least the last one
            column, num_common = column - 1, num_common - 1
        first_columns.append(column)
        counts.append(match.cached_row.seen - num_common)
    feed_from, rollback = torch.tensor(first_columns), torch.tensor(counts)
    rows = torch.tensor([match.cached_row.row for match in matches])
    longest_rollback = int(rollback.max())
    # States can neither be rolled back nor skip tokens that they have seen.
    can_continue = cache.is_usable and not (cache.has_states and (longest_rollback or len(set(first_columns)) > 1))
    can_continue = can_continue and cache.can_rollback(rollback, rows)
    if not can_prefill_again and (longest_rollback or not can_continue):
        cache.check_usable()
        row = int(rollback.argmax())
        raise ValueError(
            f"{difference_message(row, matches[row], ids[row])}; a prompt cannot be prefilled again with other inputs "
            "than ids"
        )
    first_column = int(feed_from.min()) if can_continue else 0
    if not can_continue:
        remedy = ""
        if cache.is_usable and not cache.has_states:
            remedy = f"; sinkattn.enable(model, ..., headroom={longest_rollback}) would avoid this"
        warnings.warn(
            f"all {tokens} tokens are prefilled again, because they differ from those of the stream{remedy}",
            RuntimeWarning,
            stacklevel=4,
        )
        feed_from = torch.zeros_like(feed_from)
        rollback = torch.tensor([match.cached_row.seen for match in matches])
    fed = token_mask & (torch.arange(tokens) < feed_from.unsqueeze(1))
    new_rows, new_rollback = rows.repeat_interleave(repeats), rollback.repeat_interleave(repeats)

    def update_cache() -> None:
        assert cache.seen is not None  # the streams are not empty
        if new_rows.tolist() != list(range(len(cache.seen))):
            cache.batch_select_indices(new_rows)
        if can_continue:
            cache.rollback(new_rollback.to(cache.seen.device))
            cache.state.renumber_columns(first_column, *(x.repeat_interleave(repeats, dim=0) for x in (ids, fed)))
        else:
            cache.reset()

    kept = torch.tensor([match.cached_row.seen for match in matches]) - rollback
    return ContinuationPlan(token_mask & ~fed, first_column, tokens, update_cache), kept
