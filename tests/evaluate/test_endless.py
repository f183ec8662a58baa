"""One stream without a break: every stretch over the right tokens, timed token by token, in memory that is constant."""

import gc
import io
import tracemalloc
from copy import deepcopy

import naive
import numpy as np
import pytest
import torch
from test_interruption import interrupted_at

from sinkattn.evaluate import demo, endless
from sinkattn.evaluate.endless import Settings
from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CHUNK_TOKENS, CacheSize, Scores, Streamed
from sinkattn.evaluate.text import Pipe, StandardLibrary, TokenStream

SETTINGS = Settings(CacheSize(4, 60), tokens=700, stretch=300)


def quiet(*progress):
    pass


def no_memory():
    return 0


@pytest.fixture(scope="module")
def expected(model, ids):
    return naive.losses(deepcopy(model).double(), ids[:701], 4, 60).numpy()


@pytest.fixture(scope="module")
def calls_and_result(model, tokenizer):
    """Sizes of the calls of the old stream, what is known after each stretch, and the result."""
    calls, known = [], []
    feed = Streamed.feed

    def counted(self, ids, targets, wanted):
        calls.append(len(ids))
        return feed(self, ids, targets, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streamed, "feed", counted)
        stream = TokenStream(StandardLibrary(), tokenizer)
        readings = iter((10, 30, 20))
        result = endless.run(
            model, stream, SETTINGS, quiet, lambda now: known.append(len(now.stretches)), lambda: next(readings)
        )
    assert calls.pop() == 64, "the new stream's window, filled at once"
    return calls, known, result


def test_stretches_have_the_means_of_a_naive_reference(calls_and_result, expected):
    _, known, result = calls_and_result
    assert known == [1, 2, 3]
    assert [(each.begin, each.end) for each in result.stretches] == [(0, 300), (300, 600), (600, 700)]
    for each in result.stretches:
        assert each.mean.tokens == each.end - each.begin
        assert each.mean.loss == pytest.approx(expected[each.begin : each.end].mean(), abs=1e-4)
    assert (result.all.mean().tokens, result.all.mean().loss) == (700, pytest.approx(expected.mean(), abs=1e-4))
    # Two of these could be confused only if they were equal.
    assert np.ptp([each.mean.loss for each in result.stretches]) > 0.01


def test_memory_is_read_after_every_stretch(calls_and_result):
    _, _, result = calls_and_result
    assert [each.resident_bytes for each in result.stretches] == [10, 30, 20]
    assert {each.kv_bytes for each in result.stretches} == {64 * 2048}


def test_the_first_tokens_of_a_stretch_with_a_full_window_are_fed_one_by_one(calls_and_result):
    calls, _, result = calls_and_result
    assert calls == [64, *[1] * 15, 221, *[1] * 15, 256, 29, *[1] * 15, 85]
    assert [each.timed for each in result.stretches] == [15] * 3
    assert all(each.seconds > 0 for each in result.stretches)
    assert Settings(CacheSize(4, 124), 4_000_000, 100_000).timed == 500


def test_times_are_medians_of_those_tokens(model, tokenizer, monkeypatch):
    """By a clock that only single tokens move."""
    now, durations = [0.0], iter([3, 1, 2, 9, 8, 5, 5, 5, 4, 9, 1, 7, 1, 2, 1])
    monkeypatch.setattr(endless.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(endless, "time_in_turns", quiet)
    monkeypatch.setattr(endless, "MAX_TIMED", 5)
    feed = Streamed.feed

    def timed(self, ids, targets, wanted):
        now[0] += next(durations) if len(ids) == 1 else 1000
        return feed(self, ids, targets, wanted)

    monkeypatch.setattr(Streamed, "feed", timed)
    result = endless.run(model, TokenStream(StandardLibrary(), tokenizer), SETTINGS, quiet, quiet, no_memory)
    assert [each.seconds for each in result.stretches] == [3, 5, 1]


def test_at_the_end_the_stream_takes_turns_with_a_new_one(calls_and_result):
    turns = calls_and_result[2].turns
    assert isinstance(turns, demo.Turns)
    assert (turns.rounds, turns.young_seen, turns.old_seen) == (15, 64, 700)


def test_a_stream_may_be_ended_early(model, stream, expected):
    """Within the second stretch, before the call that is its last."""
    told = []
    with interrupted_at(model, 1 + 15 + 1 + 15 + 2):
        result = endless.run(model, stream, SETTINGS, quiet, told.append, no_memory)
    begin, end = result.stretches[-1].begin, result.stretches[-1].end
    assert (begin, end) == (300, 571)
    assert result.stretches[-1].mean.loss == pytest.approx(expected[begin:end].mean(), abs=1e-4)
    assert result.all.mean().tokens == end
    assert result.turns is None
    assert told == [result] * 2
    with interrupted_at(model, 1), pytest.raises(Interrupted):
        endless.run(model, stream, SETTINGS, quiet, told.append, no_memory)
    assert len(told) == 2


def test_a_stream_is_kept_that_is_ended_in_turns_with_a_new_one(model, stream, calls_and_result):
    calls, _, result = calls_and_result
    with interrupted_at(model, len(calls) + 2):
        ended = endless.run(model, stream, SETTINGS, quiet, quiet, no_memory)
    assert [each.mean for each in ended.stretches] == [each.mean for each in result.stretches]
    assert ended.turns is None


@pytest.mark.parametrize("leak", [False, True])
def test_nothing_is_kept_of_tokens_that_have_left_the_window(leak, tokenizer, monkeypatch):
    """Of 4,000 tokens in a stretch, their losses alone would take 32 kB. The cache itself has tests of its own."""

    class Constant:
        kv_bytes = 0

        def __init__(self, model, size, compile):
            pass

        def feed(self, ids, targets, wanted):
            return Scores(torch.ones(len(ids), dtype=torch.float64), wanted)

    monkeypatch.setattr(endless, "Streamed", Constant)
    monkeypatch.setattr(endless, "time_in_turns", quiet)
    stream = TokenStream(Pipe(io.StringIO("for name in names:\n    print(name)\n" * 50)), tokenizer)
    kept = []

    def on_progress(done, loss):
        if leak:
            kept.append(np.zeros(CHUNK_TOKENS))

    def traced():
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        result = endless.run(None, stream, Settings(CacheSize(4, 60), 12_000, 4_000), on_progress, quiet, traced)
    finally:
        tracemalloc.stop()
    memory = [each.resident_bytes for each in result.stretches]
    assert len(memory) == 3
    assert (memory[2] - memory[1] > 16_000) == leak


@pytest.mark.parametrize("name", ["tokens", "stretch"])
def test_stretches_without_a_token_to_time_are_refused(name, model, stream):
    settings = Settings(**{"cache": CacheSize(4, 60), "tokens": 700, "stretch": 300, name: 127})
    with pytest.raises(ValueError, match=rf"{name}: expected at least twice sinks \+ window \(128\), got 127"):
        endless.run(model, stream, settings, quiet, quiet, no_memory)
