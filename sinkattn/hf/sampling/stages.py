"""What changes scores before a choice: the logits processors of transformers' `generate`, in its order, by rows.

A stage runs on the rows of a batch whose streams want it, so it costs and changes nothing for others. What it needs of
their parameters is on the device from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from sinkattn.hf.sampling.params import SamplingParams
from sinkattn.hf.sampling.stream_sampler import StreamSampler

MIN_TEMPERATURE = 1e-30

Apply: TypeAlias = Callable[[Tensor, Tensor | None], Tensor]
"""From scores, float32 ``[rows, vocabulary]``, and ids in sight, int64 ``[rows, tokens]``, to new scores.

It may write into the scores that it is given. Unknown ids are negative; None for the ids if no stream wants them.
"""


@dataclass(frozen=True)
class Stage:
    """A change of scores: which streams want it, and how it is made for them."""

    wanted: Callable[[SamplingParams], bool]
    prepare: Callable[[Sequence[StreamSampler], torch.device], Apply]


def _column(name: str, streams: Sequence[StreamSampler], device: torch.device) -> Tensor:
    """A parameter of the streams: float32 ``[rows, 1]``, as precise as scores."""
    values = [[float(getattr(stream.params, name))] for stream in streams]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _add_bias(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    longest = max(len(stream.params.logit_bias) for stream in streams)
    # Nothing is added to token 0 to fill up shorter rows.
    rows = [[*stream.params.logit_bias.items(), *[(0, 0.0)] * longest][:longest] for stream in streams]
    tokens = torch.tensor([[token for token, _ in row] for row in rows], dtype=torch.int64, device=device)
    biases = torch.tensor([[bias for _, bias in row] for row in rows], dtype=torch.float32, device=device)
    return lambda scores, ids: scores.scatter_add_(1, tokens, biases)


def _penalize(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    repetition, presence, frequency = (
        _column(f"{name}_penalty", streams, device) for name in ("repetition", "presence", "frequency")
    )
    counts_matter = any(stream.params.frequency_penalty for stream in streams)
    longest = max(len(stream.end_ids) for stream in streams)
    ends = [[*sorted(stream.end_ids), *[-1] * longest][:longest] for stream in streams]
    exempt = torch.tensor(ends, dtype=torch.int64, device=device).unsqueeze(1)

    def apply(scores: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        known = ids >= 0
        # An unknown id is replaced by a known one: a token is penalized once, however often it stands here.
        at = torch.where(known, ids, ids.amax(dim=1, keepdim=True)).clamp(min=0)
        before = scores.gather(1, at)
        after = torch.where(before < 0, before * repetition, before / repetition) - presence
        if counts_matter:
            counts = torch.zeros_like(scores).scatter_add_(1, at, known.to(scores.dtype))
            after -= frequency * counts.gather(1, at)
        penalized = known.any(dim=1, keepdim=True) & ~(at.unsqueeze(2) == exempt).any(dim=2)
        return scores.scatter_(1, at, torch.where(penalized, after, before))

    return apply


def _process(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    def apply(scores: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is not None
        rows = []
        for row, stream in enumerate(streams):
            known, one = ids[row][ids[row] >= 0].unsqueeze(0), scores[row : row + 1]
            for processor in stream.params.processors:
                one = processor(known, one)  # type: ignore[arg-type]  # LongTensor, a legacy type
            rows.append(one)
        return torch.cat(rows)

    return apply


def _allow(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    bits = torch.arange(8, dtype=torch.uint8, device=device)

    def apply(scores: Tensor, ids: Tensor | None) -> Tensor:
        masks = torch.stack([stream.grammar.allowed() for stream in streams if stream.grammar is not None])
        if device.type == "cuda":
            masks = masks.pin_memory()
        bytes_ = masks.to(device, non_blocking=True)
        allowed = (bytes_.unsqueeze(2) >> bits & 1).flatten(1)[:, : scores.shape[1]].bool()
        return scores.masked_fill_(~allowed, -torch.inf)

    return apply


def _divide(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    # A score divided by less would overflow, or be NaN; the likeliest token comes in either case.
    temperature = _column("temperature", streams, device).clamp_(min=MIN_TEMPERATURE)
    return lambda scores, ids: scores.div_(temperature)


def _keep_top_k(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    numbers = [[stream.params.top_k] for stream in streams]
    largest, number = max(numbers)[0], torch.tensor(numbers, dtype=torch.int64, device=device)

    def apply(scores: Tensor, ids: Tensor | None) -> Tensor:
        vocabulary = scores.shape[1]
        likeliest = scores.topk(min(largest, vocabulary), dim=1).values
        return scores.masked_fill_(scores < likeliest.gather(1, number.clamp(max=vocabulary) - 1), -torch.inf)

    return apply


def _keep_top_p(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    top_p = torch.tensor([[stream.params.top_p] for stream in streams], dtype=torch.float64, device=device)

    def apply(scores: Tensor, ids: Tensor | None) -> Tensor:
        every = weights(scores)
        total = every.sum(dim=1, keepdim=True)
        candidates, tokens = scores, None
        if device.type == "cpu":
            # Sorting takes long there. Who has less than an equal share of what is left out is left out in any case.
            likely = every * scores.shape[1] > (1 - top_p) * total
            number = max(1, int(likely.sum(dim=1).max()))
            tokens = scores.topk(number, dim=1, sorted=False).indices.sort(dim=1).values
            candidates = scores.gather(1, tokens)
        # Of equally likely tokens those with higher ids are left out first.
        candidates, order = candidates.sort(dim=1, descending=True, stable=True)
        every = weights(candidates)
        left_out = every.cumsum(dim=1) - every >= top_p * total
        candidates.masked_fill_(left_out, -torch.inf)
        tokens = order if tokens is None else tokens.gather(1, order)
        return scores.fill_(-torch.inf).scatter_(1, tokens, candidates)

    return apply


def _keep_min_p(streams: Sequence[StreamSampler], device: torch.device) -> Apply:
    lowest = _column("min_p", streams, device).log()
    return lambda scores, ids: scores.masked_fill_(scores < scores.amax(dim=1, keepdim=True) + lowest, -torch.inf)


def weights(scores: Tensor) -> Tensor:
    """What probabilities are in proportion to: float64 ``[rows, vocabulary]``.

    Each is computed from a score and the largest one, and sums of them are off by 1e-16 at most, so they do not depend
    on the batch or the device.
    """
    return (scores - scores.amax(dim=1, keepdim=True)).double().exp_()


STAGES = (
    Stage(lambda params: bool(params.logit_bias), _add_bias),
    Stage(lambda params: params.has_penalties, _penalize),
    Stage(lambda params: bool(params.processors), _process),
    Stage(lambda params: params.grammar is not None, _allow),
    Stage(lambda params: params.temperature not in (0, 1), _divide),
    Stage(lambda params: not params.is_greedy and params.top_k > 0, _keep_top_k),
    Stage(lambda params: not params.is_greedy and params.top_p < 1, _keep_top_p),
    Stage(lambda params: not params.is_greedy and params.min_p > 0, _keep_min_p),
)
