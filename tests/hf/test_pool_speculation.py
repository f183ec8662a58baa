"""Drafts of a `StreamPool`: every token is the one that comes without them, in fewer forwards if they are right."""

import asyncio
import copy
import random
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import torch
from hf_models import build, interrupted
from pool_streams import HEADROOM, S, W, model_in_double, some_ids
from transformers import LogitsProcessor

import sinkattn
from sinkattn import DraftModel, PromptLookup, SamplingParams, StreamPool
from sinkattn.hf.pool.ids import StreamIds
from sinkattn.hf.pool.prompt_lookup import following
from sinkattn.hf.sampling.batch_sampler import Chosen

DRAFTS = HEADROOM - 1


@cache
def other_model():
    """It knows nothing of what the model says."""
    return sinkattn.enable(build("llama", torch.float64, seed=5), S, W + 3, HEADROOM)


SPECULATIONS = {
    "lookup": lambda: PromptLookup(num_tokens=DRAFTS),
    "right": lambda: DraftModel(model_in_double(), DRAFTS),
    "wrong": lambda: DraftModel(other_model(), DRAFTS),
}
ALL_PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.5, seed=1),
    SamplingParams(repetition_penalty=1.3, logit_bias={3: 2.0, 7: float("-inf")}, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2, presence_penalty=0.3, frequency_penalty=0.2),
]


def pool_of(way=None, num_rows=8, **options):
    return StreamPool(model_in_double(), num_rows, speculation=way and SPECULATIONS[way](), **options)


def count_forwards(pool):
    """For each forward of a pool, which comes into this list, how many tokens of each stream it runs."""
    forwards, run = [], pool.scheduler.engine.memory.run

    def noted(inputs):
        forwards.append([len(x.ids) for x in inputs])
        return run(inputs)

    pool.scheduler.engine.memory.run = noted
    return forwards


def same_with_and_without(talk, **options):
    """Compare what a function returns for a pool without drafts and those with them."""
    want = talk(pool_of(**options))
    for way in SPECULATIONS:
        assert talk(pool_of(way, **options)) == want, way


def test_tokens_are_those_without_drafts():
    """Of several streams at once, far past evictions, with whatever changes scores."""

    def talk(pool):
        streams = [pool.open(some_ids(index, index), sampling=x) for index, x in enumerate(ALL_PARAMS)]
        for index, stream in enumerate(streams):
            stream.feed(some_ids(5 + 9 * index, index))
        iterators = [stream.generate() for stream in streams]
        tokens = [[next(x) for x in iterators] for _ in range(5 * W)]
        scores = [(x[2].logprob, x[2].top_logprobs) for x in tokens]
        return (
            tokens,
            [stream.in_sight for stream in streams],
            [round(x, 9) for x, _ in scores],
            [[*x] for _, x in scores],
        )

    same_with_and_without(talk, max_prefix=4)


def test_right_drafts_save_forwards_and_wrong_ones_do_not():
    number = {}
    for way in (None, *SPECULATIONS):
        pool = pool_of(way)
        forwards = count_forwards(pool)
        stream = pool.open()
        stream.feed(some_ids(9))
        assert len(list(stream.generate(100))) == 100
        number[way] = len(forwards)
        forwards.clear()
        assert [len(list(stream.generate(1))) for _ in range(5)] == [1] * 5
        assert forwards == [[1]] * 5  # no draft could be used
    assert number[None] == 100  # one for what was fed
    assert number["right"] <= 1 + 2 + 100 / (DRAFTS + 1)
    assert number["lookup"] < 60  # it repeats itself
    assert number["wrong"] >= 90


class WithoutTheLast(LogitsProcessor):
    """Forbids the last five tokens."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, input_ids[0, -5:], -float("inf"))


def test_whatever_comes_between(tmp_path):
    """Forks, rollbacks, saves, texts, ends and parking while tokens are ready."""

    def talk(pool):
        rng, seen = random.Random(0), []
        streams = [
            pool.open(
                some_ids(index % 4, index),
                sampling=ALL_PARAMS[index % 4] if index < 5 else SamplingParams(processors=[WithoutTheLast()]),
                evict="message" if index % 2 else "token",
            )
            for index in range(6)
        ]
        iterators = [None] * 6
        for index, stream in enumerate(streams):
            stream.feed(some_ids(3 * index + 1, index))
        for number in range(100):
            index = rng.randrange(6)
            stream = streams[index]
            kind = rng.choice(
                ["go on"] * 4 + ["feed", "later", "rollback", "fork", "save", "close", "some", "stop", "reset"]
            )
            if kind in ("fork", "save", "some", "stop") and iterators[index] is not None:
                iterators[index] = iterators[index].close()
            if kind == "go on":
                iterators[index] = iterators[index] or stream.generate()
                seen.append([next(iterators[index]) for _ in range(rng.randrange(1, 9))])
            elif kind in ("feed", "later"):
                stream.feed(some_ids(rng.randrange(1, W), number), wait=kind == "feed")
            elif kind == "rollback":
                stream.rollback(min(len(stream) - 1, HEADROOM - DRAFTS))
            elif kind == "fork":
                fork = stream.fork()
                seen.append(list(fork.generate(rng.randrange(9))))
                fork.close()
            elif kind == "save" and index < 5:
                stream.save(tmp_path / "saved")
                stream.close()
                streams[index] = pool.load(tmp_path / "saved")
            elif kind == "close" and iterators[index] is not None:
                iterators[index] = iterators[index].close()
            elif kind == "some":
                seen.append(list(stream.generate(rng.randrange(9))))
            elif kind == "stop":
                fork = stream.fork()
                stop = list(fork.generate(6))[-1]
                fork.close()
                seen.append(list(stream.generate(stop=[stop])))
            elif kind == "reset":
                stream.reset()
                stream.feed(some_ids(4, number))
            seen.append((kind, len(streams[index]), streams[index].in_sight))
        return seen

    same_with_and_without(talk, num_rows=3, max_parked=9, max_prefix=4)


def test_forks_and_saves_between_tokens_that_are_ready(tmp_path):
    """At each of them; the stream itself goes on."""

    def talk(pool):
        stream = pool.open(sampling=SamplingParams(temperature=0.3, seed=3))
        stream.feed(some_ids(40))
        tokens, got = stream.generate(), []
        for number in range(12):
            got.append(next(tokens))
            stream.save(tmp_path / "a")
            for other in (stream.fork(), pool.load(tmp_path / "a")):
                got.append(list(other.generate(3)))
                other.close()
            if number % 3 == 2:
                got.append([next(tokens) for _ in range(3)])
        return got

    same_with_and_without(talk)


def test_a_text_by_a_grammar(shipped):
    """It ends where the text does, though more was drafted, and the next one begins there."""
    pytest.importorskip("llguidance")
    model, tokenizer = shipped
    model = sinkattn.enable(copy.deepcopy(model).double(), 4, 60, 6)

    def talk(speculation):
        pool = StreamPool(model, 2, tokenizer=tokenizer, speculation=speculation)
        forwards, said = count_forwards(pool), []
        for temperature in (0.0, 1.0):
            params = SamplingParams(grammar="start: /(ab){9,14}/", temperature=temperature, seed=0)
            with pool.open(sampling=params) as stream:
                stream.feed("cdabababababab")
                said += ([*stream.generate()] for _ in range(2))
                part = stream.generate()
                begun = [next(part) for _ in range(5)]
                stream.feed("x")  # the text goes on
                said.append([*begun, *part])
        return said, len(forwards)

    want, number = talk(None)
    assert all(re.fullmatch("(ab){9,14}", tokenizer.decode(text)) for text in want)
    for speculation in (PromptLookup(num_tokens=6), DraftModel(model, 6)):
        got, fewer = talk(speculation)
        assert got == want
        assert fewer < number


def test_drafts_end_where_the_window_begins_with_another_message():
    """Or a token would see a part of a message."""
    model = sinkattn.enable(build("llama", torch.float64, num_hidden_layers=1), S, W, HEADROOM)

    def talk(speculation):
        pool = StreamPool(model, 2, speculation=speculation)
        forwards = count_forwards(pool)
        stream = pool.open(evict="message")
        for index in range(9):
            stream.feed(some_ids(2, index))
        tokens = stream.generate(8)
        return [(next(tokens), stream.in_sight) for _ in range(8)], forwards

    want, _ = talk(None)
    got, forwards = talk(DraftModel(model, DRAFTS))
    assert got == want
    assert len({len(seen) for _, seen in want}) > 1  # messages have left
    assert len(forwards) < 9 + 8


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_step_that_fails_is_repeated(error):
    """In a forward of the model or of the draft model, which are the same."""
    model = sinkattn.enable(build("llama", torch.float64), S, W, HEADROOM)

    def talk(speculation, failing):
        pool = StreamPool(model, 2, speculation=speculation)
        streams = pool.open(sampling=SamplingParams(temperature=0.3, seed=3)), pool.open()
        for index, stream in enumerate(streams):
            stream.feed(some_ids(40, index))
        got, iterators = ([], []), [stream.generate() for stream in streams]

        def go_on(count):
            while len(got[1]) < count:
                for index in range(2):
                    iterators[index] = iterators[index] or streams[index].generate()
                    got[index].append(next(iterators[index]))

        for runs in failing:
            go_on(len(got[1]) + 2)
            with interrupted(model.model.layers[1], runs, error):
                go_on(100)
            iterators = [iterator.close() for iterator in iterators]
        go_on(100)
        return got[1], got[0][:100]

    assert talk(DraftModel(model, DRAFTS), range(6)) == talk(None, ())


@pytest.mark.parametrize("place", ["commit", "write", "read"])
def test_an_interruption_loses_no_token_and_no_draw(place, monkeypatch):
    """While tokens are counted, handed out or chosen."""
    length = 60

    def talk(way, number=None):
        pool, calls = pool_of(way), 0
        stream = pool.open(sampling=SamplingParams(temperature=0.3, seed=3))
        stream.feed(some_ids(40))
        owner = {"commit": pool.scheduler.engine.memory, "write": StreamIds, "read": Chosen}[place]
        original = getattr(owner, place)

        def interrupt(*arguments):
            nonlocal calls
            result = original(*arguments)
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, place, interrupt)
            while len(stream) < length:
                try:
                    for _ in stream.generate(length - len(stream)):
                        pass
                except KeyboardInterrupt:
                    pass
        assert number is None or calls >= number
        return stream.in_sight, stream._state.sampler.draws

    want = talk(None)
    for number in range(1, 14):
        assert talk("right", number) == want, number


def test_a_processor_that_fails_later_fails_at_its_token():
    class BrokenAfter(LogitsProcessor):
        def __call__(self, input_ids, scores):
            if input_ids.shape[1] > 9:
                raise OSError("no such file")
            return scores

    def talk(pool):
        stream, other = pool.open(sampling=SamplingParams(processors=[BrokenAfter()])), pool.open()
        for each in (stream, other):
            each.feed(some_ids(4))
        tokens, others, got = stream.generate(), other.generate(), []

        def talk_both():
            while True:
                got.extend((next(tokens), next(others)))

        with pytest.raises(OSError, match="no such file"):
            talk_both()
        return got, [next(others) for _ in range(9)], len(stream)

    same_with_and_without(talk)


def test_rows_of_a_forward_are_at_most_half_padding():
    pool = pool_of("lookup")
    forwards = count_forwards(pool)
    same = pool.open(sampling=SamplingParams(logit_bias={5: 1e9}))  # always right
    others = [pool.open(sampling=SamplingParams(temperature=5.0, seed=index)) for index in range(6)]
    streams = [same, *others]
    for index, stream in enumerate(streams):
        stream.feed(some_ids(6, index))
    iterators = [stream.generate() for stream in streams]
    for _ in range(9):
        for tokens in iterators:
            next(tokens)
    assert {DRAFTS + 1, 1} <= {max(lengths) for lengths in forwards}
    assert all(max(lengths) * len(lengths) <= 2 * sum(lengths) for lengths in forwards)
    assert any(len({*lengths}) > 1 for lengths in forwards)


def test_what_cannot_be_drafted_is_refused():
    model, narrow = model_in_double(), sinkattn.enable(build("llama"), S, W, 2)
    for speculation, message in (
        (PromptLookup(num_tokens=HEADROOM + 1), "expected num_tokens up to 4, the headroom .* of the model, .* got 5"),
        (DraftModel(narrow, 3), "expected num_tokens up to 2, the headroom .* of the draft model, .* got 3"),
        (
            DraftModel(sinkattn.enable(build("llama", vocab_size=98), S, W, 4)),
            "expected a model with a vocabulary of 97",
        ),
        (DraftModel(model_in_double("gpt2")), "expected a model all of whose layers attend over rings, got GPT2"),
    ):
        with pytest.raises(ValueError, match=f"speculation: {message}"):
            StreamPool(model, 2, speculation=speculation)
    for family in ("gpt2", "falcon_h1"):
        with pytest.raises(ValueError, match=r"speculation: expected None, as models .*, got PromptLookup"):
            StreamPool(model_in_double(family), 2, speculation=PromptLookup(num_tokens=1))
    with pytest.raises(ValueError, match="num_tokens: expected 1 or more, got 0"):
        PromptLookup(num_tokens=0)
    with pytest.raises(ValueError, match="max_ngram: expected 1 or more, got 0"):
        PromptLookup(max_ngram=0)
    with pytest.raises(ValueError, match="num_tokens: expected 1 or more, got 0"):
        DraftModel(model, 0)
    with pytest.raises(ValueError, match=r"model: expected a model prepared by sinkattn\.enable"):
        DraftModel(build("llama"))


@pytest.mark.parametrize(
    ("ids", "count", "drafts"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 4, 7, 2, 3, 5, 1, 2, 3], 1, [4]),  # the longest
        ([2, 3, 4, 2, 3, 5, 1, 2, 3], 1, [5]),  # the last of these
        ([6, 1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # goes on with itself
        ([8, 8], 3, [8, 8, 8]),
        ([1, 2, 3], 2, []),
        ([1], 2, []),
    ],
)
def test_prompt_lookup(ids, count, drafts):
    assert following(np.array(ids), count, max_ngram=3) == drafts


def test_threads_and_tasks_get_their_own_tokens():
    def talk_in(pool, index):
        with pool.open(sampling=ALL_PARAMS[index % 2]) as stream:
            stream.feed(some_ids(5 + index, index))
            return [*stream.generate(20), *stream.generate(9)]

    async def talk_async(pool, index):
        with pool.open(sampling=ALL_PARAMS[index % 2]) as stream:
            await stream.feed_async(some_ids(5 + index, index))
            return [token for count in (20, 9) async for token in stream.generate_async(count)]

    async def all_async(pool):
        return await asyncio.wait_for(asyncio.gather(*(talk_async(pool, index) for index in range(6))), 60)

    want = [talk_in(pool_of(), index) for index in range(6)]
    pool = pool_of("right", num_rows=4, max_parked=8)
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(talk_in, [pool] * 6, range(6), timeout=60)) == want
    assert asyncio.run(all_async(pool)) == want
    assert len(pool) == 0
    assert not pool._drafter._followers


def test_a_draft_model_begins_anew_where_it_cannot_follow():
    """After a rollback that it has no headroom for, and tokens that came without it."""
    plain, pool = pool_of(), pool_of("right")
    forwards, got = count_forwards(pool), []
    for each in (plain, pool):
        stream = each.open()
        stream.feed(some_ids(20))
        tokens = list(stream.generate(9))
        stream.feed(some_ids(9 * W, 1))
        tokens += stream.generate(9)
        stream.rollback(1)
        stream.feed(some_ids(2, 2))
        forwards.clear()
        tokens += stream.generate(40)
        got.append((tokens, stream.in_sight))
    assert got[0] == got[1]
    assert len(forwards) <= 3 + 40 / (DRAFTS + 1)  # again right
    assert pool.nbytes == 2 * plain.nbytes
