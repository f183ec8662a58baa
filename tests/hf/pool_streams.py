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
        evict: what leaves its window at a time.
    """

    def __init__(self, params=None, prefix=(), evict="token"):
        self.params, self.ids = params or SamplingParams(), [*prefix]
        self.prefix, self.evict = [*prefix], evict
        self.num_sinks = max(len(prefix), S)
        self.draws = 0
        self.messages, self.peak = {}, 0
        """First token of each message, and the one after those that have one window there."""
        self.unchecked = []

    def feed(self, ids, *, begins_message=True, num_following=0):
        if ids and begins_message:
            self.messages[len(self.ids)] = len(self.ids) + len(ids) + num_following
        self.ids += ids

    def generate(self, token):
        self.unchecked.append(Drawn(len(self.ids), self.draws))
        self.ids.append(token)
        self.draws += not self.params.is_greedy

    @property
    def sure_rollback(self):
        """So many tokens can always be rolled back."""
        return HEADROOM - max(0, self.peak - len(self.ids))

    def rollback(self, count):
        if not count:
            return
        self.peak = max(self.peak, len(self.ids))
        del self.ids[len(self.ids) - count :]
        count = len(self.ids)
        self.messages = {begin: min(end, count) for begin, end in self.messages.items() if begin < count}

    def reset(self):
        self.ids, self.messages, self.peak = [*self.prefix], {}, 0

    def in_sight(self, length):
        """Ids that the last of so many tokens sees."""
        sinks, recent = self.ids[:length][: self.num_sinks], self.ids[self.num_sinks : length]
        if self.evict == "token":
            return sinks + recent[-W:]
        begun = {begin: end for begin, end in self.messages.items() if begin < length}
        end = max([length, *begun.values()])
        begins = sorted({self.num_sinks, *(begin for begin in begun if begin > self.num_sinks)})
        # With what there is room for, all of it or nothing is in sight of a message; the last tokens of a long one are.
        first = next((begin for begin in begins if end - begin <= W), begins[-1])
        return sinks + recent[max(first, length - W) - self.num_sinks :]

    def check(self, model, plain=None):
        """Compare generated tokens with those that the model chooses in one run over all ids.

        With eviction by messages from those in sight, by a ``plain`` model of one layer.
        """
        if not self.unchecked:
            return
        sampler = StreamSampler(self.params, vocabulary=VOCABULARY)
        logits = self._logits(model) if self.evict == "token" else None
        for position, sampler.draws in self.unchecked:
            ids = torch.tensor([self.in_sight(position)])
            if logits is not None:
                own = logits[position - 1 : position]
            else:
                with torch.no_grad():
                    own = plain(ids).logits[:, -1]
            [token] = BatchSampler().choose(own, [sampler], ids).read()
            assert token == self.ids[position], (position, self.params)
        self.unchecked.clear()

    def _logits(self, model):
        cache = sinkattn.SinkCache(model, num_sinks=self.num_sinks)
        with torch.no_grad():
            return model(input_ids=torch.tensor([self.ids]), **{forward_cache(model): cache}).logits[0]
