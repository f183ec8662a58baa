"""A chat of many rounds in one stream: whether replies end, keep to the template, and do not repeat themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sinkattn.evaluate.exact_match import QUARTERS
from sinkattn.evaluate.methods import Streamed
from sinkattn.hf import SamplingParams
from sinkattn.hf.chat.template import ChatTemplate
from sinkattn.hf.stream import end_ids, stream_tokens

# Length in tokens of what counts as repeated.
NGRAM = 4
# The length of questions is estimated from so many.
SAMPLE = 20

FORMS = (
    "What should I know about {}?",
    "Give me one tip for {}.",
    "How would you explain {} to a child?",
    "What is the best time of the day for {}?",
    "Tell me a short story about {}.",
    "What do people often get wrong about {}?",
    "Why do people enjoy {}?",
    "What do I need for {}?",
    "Is {} good for my health?",
    "Who could help me with {}?",
)
THEMES = (
    "baking bread",
    "learning to swim",
    "growing tomatoes",
    "a walk in the forest",
    "writing letters",
    "travelling by train",
    "painting a room",
    "looking after a cat",
    "sleeping well",
    "playing the guitar",
)


def everyday_questions() -> list[str]:
    """A hundred different questions, always in the same order, neighbours about different things."""
    pairs = list(product(FORMS, THEMES))
    return [pairs[index][0].format(pairs[index][1]) for index in np.random.default_rng(0).permutation(len(pairs))]


def question_tokens(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> int:
    """Mean tokens of a turn up to its reply, over the first questions; raises ValueError as `converse` does."""
    asked = [*map(ChatTemplate.of(tokenizer).asked, questions[:SAMPLE])]
    return sum(map(len, tokenizer(asked, add_special_tokens=False).input_ids)) // len(asked)


@dataclass(frozen=True)
class Round:
    """A question and its reply."""

    question: str
    reply: str
    tokens: int
    """Tokens of the reply."""
    ended: bool
    """Whether the model ended the reply itself, within the limit."""
    well_formed: bool
    """Whether the round has the special tokens of the template, each once and in order, and no others."""
    repeated: float | None
    """Fraction of the reply's runs of `NGRAM` tokens that stood in the reply before; None for a shorter reply."""
    seconds: list[float]
    """Time of each of its tokens but the first, which waits for the question."""
    kv_bytes: int
    """Size of the cache after it."""


def converse(
    streamed: Streamed,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[str],
    max_reply: int,
    sampling: SamplingParams,
    system: str | None = None,
) -> Iterator[Round]:
    """Ask questions in one new stream, feeding only new tokens, and yield each round with its sampled reply.

    Args:
        streamed: model and cache.
        tokenizer: one with a chat template.
        questions: what the user says in each round.
        max_reply: tokens after which a reply is cut off and its turn closed.
        sampling: how replies are sampled; its seed is that of the first round, and each round has the next one.
        system: the system prompt; None for what the template writes without one.

    Raises:
        ValueError: for a chat template that cannot be continued turn by turn, or a model without an end token.
        Interrupted: if it is raised in a forward; the round that it interrupts is not yielded.
    """
    template = ChatTemplate.of(tokenizer, system)
    stop_ids = end_ids(streamed.model)
    if not stop_ids:
        raise ValueError("chat: this model has no end token, so it cannot end a reply")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def special_ids(ids: list[int]) -> list[int]:
        return [number for number in ids if number in special]

    end = encode(template.end)
    template_ids = special_ids(encode(template.asked("")) + end)
    streamed.reset()
    fed = encode(template.start)
    for number, question in enumerate(questions):
        asked, reply, times = encode(template.asked(question)), [], [time.perf_counter()]
        tokens = stream_tokens(
            streamed.model,
            fed + asked,
            streamed.cache,
            max_new_tokens=max_reply,
            stop_ids=stop_ids,
            sampling=replace(sampling, seed=None if sampling.seed is None else sampling.seed + number),
        )
        for token in tokens:
            reply.append(token)
            times.append(time.perf_counter())
        ended = len(reply) < max_reply
        yield Round(
            question,
            str(tokenizer.decode(reply)),
            len(reply),
            ended,
            special_ids(asked + reply + end) == template_ids,
            repeated_share(reply),
            [after - before for before, after in pairwise(times[1:])],
            streamed.kv_bytes,
        )
        # The last token of a reply that was cut off has not been fed.
        fed = end if ended else reply[-1:] + end


def repeated_share(ids: list[int]) -> float | None:
    """Fraction of the runs of `NGRAM` ids that stood there before; None if there are none."""
    runs = [tuple(ids[begin : begin + NGRAM]) for begin in range(len(ids) - NGRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else None


def summary(rounds: list[Round], planned: int) -> dict[str, Any]:
    """Counts over all rounds, and means by quarter of the ``planned`` rounds (None for a quarter without any).

    Seconds are medians of tokens.
    """
    quarters: list[list[Round]] = [[] for _ in range(QUARTERS)]
    for number, each in enumerate(rounds):
        quarters[number * QUARTERS // planned].append(each)

    def by_quarter(values: Callable[[Round], list[float]], average: Callable[[list[float]], float]) -> list[Any]:
        pooled = [[value for each in quarter for value in values(each)] for quarter in quarters]
        return [average(values) if values else None for values in pooled]

    return {
        "rounds": len(rounds),
        "ended": sum(each.ended for each in rounds),
        "well_formed": sum(each.well_formed for each in rounds),
        "ended_by_quarter": by_quarter(lambda each: [each.ended], statistics.fmean),
        "reply_tokens_by_quarter": by_quarter(lambda each: [each.tokens], statistics.fmean),
        "repeated_by_quarter": by_quarter(
            lambda each: [] if each.repeated is None else [each.repeated], statistics.fmean
        ),
        "seconds_by_quarter": by_quarter(lambda each: each.seconds, statistics.median),
        "kv_bytes": [rounds[0].kv_bytes, rounds[-1].kv_bytes],
    }
