"""After beam search: brings the rows of a cache in line with the hypotheses that were returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.id_history import common_prefix_length
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.generation.options import call_setting, eos_ids
from sinkattn.hf.model_patch import require_patch
from sinkattn.hf.versions import forward_cache


def _sync_rows(
    cache: SinkCache,
    generated: Tensor,
    lengths: Tensor,
    start: int,
    beams: int,
    feed: Callable[[Tensor, Tensor], None],
) -> None:
    """Make each row of the cache hold a returned hypothesis: beam search leaves them at its last running beams.

    Each hypothesis takes the row of its prompt with the longest common prefix; what differs is rolled back and fed.

    Args:
        cache: ``prompts * beams`` rows; ``prompts * returned`` afterwards.
        generated: ``[prompts * returned, tokens]``, the ids returned after the prompt, padded.
        lengths: int64 ``[prompts * returned]``, number of these ids without padding.
        start: column of the first of them.
        beams: rows of the cache for each prompt.
        feed: called with ids and mask, ``[rows, tokens]``, to feed them.
    """
    generated, lengths = generated.cpu(), lengths.cpu()
    assert cache.seen is not None  # the call has fed its prompt
    num_fed, seen = cache.tokens_seen - start, cache.seen.tolist()
    known = cache.state.history.known_tokens(seen)
    returned = len(generated) * beams // len(seen)
    source, num_common = [], []
    for row, ids in enumerate(generated):
        group = range(row // returned * beams, (row // returned + 1) * beams)
        common_lengths = []
        for beam in group:
            # Beam search feeds no padding, so each row got one token per column since ``start``.
            begin = seen[beam] - num_fed
            numbers, known_ids = (x[known[beam][0] >= begin] for x in known[beam])
            common_lengths.append(common_prefix_length(numbers - begin, known_ids, num_fed, ids[: lengths[row]]))
        num_common.append(max(common_lengths))
        source.append(group[common_lengths.index(max(common_lengths))])
    # The last id is not fed, as always after generate.
    end = generated.shape[1] - 1
    begin = min(*num_common, end)
    token_mask = torch.arange(generated.shape[1]) < lengths.unsqueeze(1)
    if source != list(range(len(seen))):
        cache.batch_select_indices(torch.tensor(source))
    try:
        cache.crop(begin - num_fed)
    except RuntimeError:
        cache.state.mark_unusable(
            "beam search returned other hypotheses than the cache holds, which differ in the last "
            f"{num_fed - begin} tokens; pass all ids of the streams to generate, or enable the model with "
            f"headroom={num_fed - begin}",
            start + begin,
            generated[:, begin:end],
            token_mask[:, begin:end],
        )
    else:
        if begin < end:
            feed(generated[:, begin:end], token_mask[:, begin:end])
    cache.state.note_ended_rows(lengths <= end, generated[:, end])


def sync_rows_with_hypotheses(
    model: PreTrainedModel, cache: SinkCache, generated: Tensor, kwargs: dict[str, Any], start: int, beams: int
) -> None:
    """Make the rows of a cache hold the hypotheses that a call of `generate` with beam search returned.

    Args:
        model: the enabled model.
        cache: of the call.
        generated: ``[prompts * returned, tokens]``, the ids returned after the prompt, padded.
        kwargs: of the call.
        start: column of the first of these ids.
        beams: rows of the cache for each prompt.
    """
    eos, pad = eos_ids(model, kwargs, generated.device), call_setting(model, kwargs, "pad_token_id")
    lengths = generated.new_full((len(generated),), generated.shape[1])
    # Id that transformers fills shorter hypotheses up with: it uses eos if the padding id is 0.
    fill = -1 if eos is None else pad or int(eos[0])
    if eos is None or kwargs.get("stopping_criteria") or call_setting(model, kwargs, "stop_strings"):
        lengths -= (generated == fill).flip(1).to(torch.int64).cumprod(dim=1).sum(dim=1)
    if eos is not None:
        is_end = torch.isin(generated, eos)
        first = is_end.to(torch.int64).argmax(dim=1) + 1
        lengths = torch.where(is_end.any(dim=1), torch.where(lengths < first, lengths, first), lengths)

    def feed(ids: Tensor, mask: Tensor) -> None:
        decoder = require_patch(model).decoder
        options = {forward_cache(decoder): cache, "use_cache": True}
        with torch.no_grad():
            decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)

    _sync_rows(cache, generated, lengths, start, beams, feed)
