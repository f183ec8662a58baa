"""What a stream of a `StreamPool` should be: a plain list of ids, and the tokens that a model alone would choose."""

from functools import cache
from typing import NamedTuple

import torch
from hf_models import VOCABULARY, build, random_ids

import sinkattn
from sinkattn import SamplingParams
from sinkattn.hf.sampling.batch_sampler import BatchSampler
from sinkattn.hf.sampling.stream_sampler import StreamSampler
from sinkattn.hf.versions import forward_cache

S, W, HEADROOM = 2, 12, 4


@cache
def model_in_double(family="llama", **overrides):
    """Without ties, and with the same tokens whatever the order of sums. Shared: do not change it."""
    return sinkattn.enable(build(family, torch.float64, **overrides), S, W, HEADROOM)


def some_ids(count, seed=0):
    return random_ids(1, count, seed=seed)[0].tolist()


class Drawn(NamedTuple):
    """A token that was generated, which nobody has checked yet."""

    position: int
    draws: int


class Record:
    """A stream as a list of ids.

    Args:
        params: how its tokens are chosen.
        prefix: its first ids.
    """

    def __init__(self, params=None, prefix=()):
        self.params, self.ids = params or SamplingParams(), [*prefix]
        self.num_sinks = max(len(prefix), S)
        self.draws = 0
        self.unchecked = []

    def feed(self, ids):
        self.ids += ids

    def generate(self, token):
        self.unchecked.append(Drawn(len(self.ids), self.draws))
        self.ids.append(token)
        self.draws += not self.params.is_greedy

    def check(self, model):
        """Compare generated tokens with those that the model chooses in one run over all ids."""
        if not self.unchecked:
            return
        cache = sinkattn.SinkCache(model, num_sinks=self.num_sinks)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([self.ids]), **{forward_cache(model): cache}).logits[0]
        sampler = StreamSampler(self.params, vocabulary=VOCABULARY)
        for position, sampler.draws in self.unchecked:
            sinks, recent = self.ids[: self.num_sinks], self.ids[self.num_sinks : position][-W:]
            in_sight = torch.tensor([sinks[:position] + recent])
            [token] = BatchSampler().choose(logits[position - 1 : position], [sampler], in_sight).read()
            assert token == self.ids[position], (position, self.params)
        self.unchecked.clear()
