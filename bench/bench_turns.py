"""Time to the first token of a turn of a chat: late, early, and with all that is in sight sent again.

    python -m pytest bench/bench_turns.py --benchmark-json=turns.json

A Llama of 116 million random parameters, a prefix of 40 tokens and a window of 1,020, of which whole messages leave. A
turn is a message of 24 tokens, and the first token of the reply:

* ``turn 200``: after as many turns, each with a reply of 40 tokens, so that the window is full.
* ``turn 2``: of a stream that has had one turn.
* ``sent again``: a new stream that is fed what turn 200 sees, and the message.
"""

from collections.abc import Callable

import torch
from bench_generate import CONFIG, random_ids
from transformers import LlamaConfig, LlamaForCausalLM

import sinkattn

PREFIX, WINDOW, MESSAGE, REPLY, TURNS, ROUNDS = 40, 1020, 24, 40, 200, 25
LATE, EARLY, AGAIN = "turn 200", "turn 2", "sent again"


def ids(count: int) -> list[int]:
    return random_ids(count)[0].tolist()


class Turns:
    """Turns of one stream."""

    def __init__(self, pool: sinkattn.StreamPool, prefix: list[int]) -> None:
        self.stream = pool.open(prefix, evict="message")

    def turn(self) -> None:
        """A message and the first token of the reply."""
        self.stream.feed(ids(MESSAGE), wait=False)
        assert len(list(self.stream.generate(1))) == 1

    def whole_turn(self) -> None:
        self.turn()
        self.stream.feed(ids(REPLY - 1), begins_message=False)

    def next_late(self) -> Callable[[], None]:
        self.stream.feed(ids(REPLY - 1), begins_message=False)
        return self.turn

    def next_early(self) -> Callable[[], None]:
        self.stream.reset()
        self.whole_turn()
        return self.turn

    def next_again(self, late: "Turns") -> Callable[[], None]:
        self.stream.reset()
        fed = late.stream.in_sight[PREFIX:]

        def send() -> None:
            self.stream.feed(fed, wait=False)
            self.turn()

        return send


def test_first_token(bench) -> None:
    torch.manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        model = sinkattn.enable(LlamaForCausalLM(LlamaConfig(**CONFIG)).eval(), 4, WINDOW)
        pool, prefix = sinkattn.StreamPool(model, 3, max_prefix=PREFIX), ids(PREFIX)
        late, early, again = (Turns(pool, prefix) for _ in range(3))
        for _ in range(TURNS):
            late.whole_turn()
        assert len(late.stream.in_sight) > PREFIX + WINDOW - MESSAGE - REPLY
        timings = bench.time_interleaved(
            {LATE: late.next_late, EARLY: early.next_early, AGAIN: lambda: again.next_again(late)}, rounds=ROUNDS
        )
    ratios = {f"{LATE} / {EARLY}": timings.ratio(LATE, EARLY), f"{AGAIN} / {LATE}": timings.ratio(AGAIN, LATE)}
    bench.add_row("Time to the first token of a turn", "fp32", {**timings.figures(LATE, EARLY, AGAIN), **ratios})
    bench.add_target(
        f"{LATE} / {EARLY} at most 1.10", "fp32", ratios[f"{LATE} / {EARLY}"], ratios[f"{LATE} / {EARLY}"] <= 1.1
    )
    bench.add_target(
        f"{AGAIN} / {LATE} at least 5", "fp32", ratios[f"{AGAIN} / {LATE}"], ratios[f"{AGAIN} / {LATE}"] >= 5
    )
