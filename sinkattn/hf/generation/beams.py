"""Makes the rows of a cache follow the hypotheses that beam search returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinkattn.hf.cache.id_history import common_tokens
from sinkattn.hf.cache.sink_cache import SinkCache
from sinkattn.hf.generation.options import call_setting, eos_ids
from sinkattn.hf.model_patch import get_patch
from sinkattn.hf.versions import forward_cache


def _adopt_hypotheses(
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
    known = cache.state.history.known_tokens(seen)
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
        cache.state.mark_unusable(
            f"beam search returned other hypotheses than those that it was at, which differ {fed - begin} tokens back; "
            "give generate all ids of the streams, or enable the model with as much headroom",
            start + begin,
            generated[:, begin:end],
            keep[:, begin:end],
        )
    else:
        if begin < end:
            feed(generated[:, begin:end], keep[:, begin:end])
    cache.state.note_ended(lengths <= end, generated[:, end])


def follow_beams(
    model: PreTrainedModel, cache: SinkCache, generated: Tensor, kwargs: dict[str, Any], start: int, beams: int
) -> None:
    """Make the rows of a cache those of the hypotheses that a call of `generate` returned.

    generated: ``[prompts * returned, tokens]`` ids after the prompt, padded; kwargs: of the call; start: column of
    the first of them; beams: rows for each prompt.
    """
    eos, pad = eos_ids(model, kwargs, generated.device), call_setting(model, kwargs, "pad_token_id")
    lengths = generated.new_full((len(generated),), generated.shape[1])
    # What it is filled up with at its end, if it is shorter than others; transformers takes no padding of id 0.
    fill = -1 if eos is None else pad or int(eos[0])
    if eos is None or kwargs.get("stopping_criteria") or call_setting(model, kwargs, "stop_strings"):
        lengths -= (generated == fill).flip(1).to(torch.int64).cumprod(dim=1).sum(dim=1)
    if eos is not None:
        is_end = torch.isin(generated, eos)
        first = is_end.to(torch.int64).argmax(dim=1) + 1
        lengths = torch.where(is_end.any(dim=1), torch.where(lengths < first, lengths, first), lengths)

    def feed(ids: Tensor, mask: Tensor) -> None:
        decoder = get_patch(model).decoder
        options = {forward_cache(decoder): cache, "use_cache": True}
        with torch.no_grad():
            decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **options)

    _adopt_hypotheses(cache, generated, lengths, start, beams, feed)
