"""A token of a model that serves alone, and while a `BackgroundLearner` learns in the same process.

    python -m pytest bench/bench_background.py --benchmark-json=background.json

A Llama of 116 million random parameters generates greedily from a window of 1028 tokens. The learner learns adapters
from chunks of 64 tokens, and the model takes over its weights; the model has two threads, the learner one, and they
take turns. Turns of tokens with a learner that has nothing to do alternate with turns while it has.

``share 0.05`` is the default of `BackgroundLearner`.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from bench_generate import CONFIG, CONTEXT, NUM_SINKS, WINDOW, Cached, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

import sinkattn

CHUNK, TOKENS, TURNS = 64, 30, 10
ALONE, LEARNING = "alone", "learning"


class Turns:
    """Turns of tokens, each of them timed."""

    def __init__(self, generation: Cached, prepare: Callable[[], None]) -> None:
        self.generation, self.prepare = generation, prepare
        self.seconds: list[float] = []

    def next_step(self) -> Callable[[], None]:
        self.prepare()
        return self.turn

    def turn(self) -> None:
        times = [time.perf_counter()]
        for _ in range(TOKENS):
            self.generation.step()
            times.append(time.perf_counter())
        self.seconds += [after - before for before, after in pairwise(times)]

    def ms(self, percentile: int) -> float:
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percentile - 1] * 1e3


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_token(bench, share: float) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        model = sinkattn.enable(LlamaForCausalLM(LlamaConfig(**CONFIG)).eval(), NUM_SINKS, WINDOW)
    with sinkattn.BackgroundLearner(model, chunk=CHUNK, share=share) as learner:
        generation = Cached(model, sinkattn.SinkCache(model), CONTEXT)

        def learn() -> None:
            while (done := learner.statistics()).tokens_fed - done.tokens_read < 2 * CHUNK:
                learner.feed(random_ids(CHUNK))

        learn()
        turns = {LEARNING: Turns(generation, learn), ALONE: Turns(generation, learner.flush)}
        timings = bench.time_interleaved(
            {name: each.next_step for name, each in turns.items()},
            rounds=TURNS,
            steps=dict.fromkeys(turns, TOKENS),
        )
        done = learner.statistics()
    assert done.updates_in_use > 0
    shape = f"share {share}"
    figures = {
        **timings.figures(ALONE, LEARNING),
        "learning / alone": timings.ratio(LEARNING, ALONE),
        **{f"{name} p95 ms": each.ms(95) for name, each in turns.items()},
        "p95 / p95": turns[LEARNING].ms(95) / turns[ALONE].ms(95),
        "updates": done.num_updates,
    }
    bench.add_row("A token while the process learns", shape, figures)
    ratio = figures["p95 / p95"]
    if share == 0.05:
        bench.add_target("token while learning / alone, 95th percentile, at most 1.2", shape, ratio, ratio <= 1.2)
