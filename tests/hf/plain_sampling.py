"""Sampling by transformers' own logits processors, one stream at a time, with the draws of `sinkattn`."""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinkattn.hf.sampling.random_numbers import Draws


def processors(
    *, repetition_penalty=1.0, custom=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0
) -> LogitsProcessorList:
    """Those that `generate` would use, in its order."""
    out = LogitsProcessorList()
    if repetition_penalty != 1:
        out.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    out.extend(custom)
    if temperature != 1:
        out.append(TemperatureLogitsWarper(float(temperature)))
    if top_k:
        out.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        out.append(TopPLogitsWarper(top_p))
    if min_p:
        out.append(MinPLogitsWarper(min_p))
    return out


class Drawn(LogitsProcessor):
    """Leaves only the token that the next draw of a seed points to, for greedy decoding to find."""

    def __init__(self, seed):
        self.draws = Draws([seed], [0], torch.device("cpu"))

    def __call__(self, input_ids, scores):
        cumulative = scores[0].double().softmax(dim=0).cumsum(dim=0).tolist()
        target = float(self.draws.uniform()) * cumulative[-1]
        token = next(i for i, value in enumerate(cumulative) if value > target)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([token]), 0.0)
