"""Ctrl-C: the next forward of a model, or of a copy, ends a measurement, and no half of a chunk counts."""

import signal
from contextlib import contextmanager
from itertools import count

import numpy as np
import pytest
import torch

from sinkattn.evaluate import exact_match, latency, perplexity, sinks
from sinkattn.evaluate.interruption import Interrupted, awaited, interruptible, waiting
from sinkattn.evaluate.items import line_items
from sinkattn.evaluate.methods import CacheSize, Recomputed, Streamed, copy_sharing_weights


def quiet(*progress):
    pass


@contextmanager
def interrupted_at(model, number):
    """From this number on, counted from 1, forwards of copies that are made within raise `Interrupted`."""
    forwards = count(1)

    def check(module, args):
        if next(forwards) >= number:
            raise Interrupted

    hook = model.register_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def forward(model):
    return model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False)


@pytest.fixture
def before():
    """Python's handler of Ctrl-C, which is not there in a shell's background."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, found)


def test_the_first_ctrl_c_ends_at_the_next_forward_and_the_second_at_once(model, before):
    with interruptible(model) as pressed:
        copy = copy_sharing_weights(model)
        forward(model)
        signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        for each in (model, copy):
            with pytest.raises(Interrupted):
                forward(each)
        with pytest.raises(KeyboardInterrupt) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.type is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is before
    forward(model)


@pytest.mark.parametrize("number", [7, 8, 9])
def test_a_chunk_that_is_interrupted_counts_for_no_method(number, model, stream):
    """Two methods with a cache and one forward of recomputation: interrupted at each of them in the third chunk."""
    caches = (CacheSize(0, 32), CacheSize(4, 28))
    settings = perplexity.Settings(caches, tokens=2000, dense_tokens=0, recompute_every=100)
    with interrupted_at(model, number):
        result = perplexity.run(model, stream, settings, quiet)
    assert result.settings.tokens == 512
    assert result.rounds == 0
    for track in result.tracks:
        assert (track.end, track.seconds) == (512, None)
    for track in result.tracks[:2]:
        assert track.all.mean().tokens == 480
        assert track.sampled.difference(result.recomputed(track).sampled).tokens == 5


def test_times_that_were_taken_are_kept(model):
    def methods():
        return [Streamed(model, CacheSize(4, 28)), Recomputed(model, 32, 0)]

    # Two rounds have eight steps.
    with interrupted_at(model, 11):
        timing = perplexity.time_interleaved(methods(), 0, 50)
    assert timing.rounds == 2
    assert min(timing.seconds) > 0
    with interrupted_at(model, 4), pytest.raises(Interrupted):
        perplexity.time_interleaved(methods(), 0, 50)


def test_questions_that_were_asked_are_kept(model, tokenizer):
    def run(count):
        predictors = [Streamed(model, CacheSize(0, 64)), Streamed(model, CacheSize(4, 60))]
        tallies, tokens = exact_match.run(predictors, line_items(1, 2), tokenizer, count, quiet)
        return [(sum(tally.asked), sum(tally.right)) for tally in tallies], tokens

    with interrupted_at(model, 8):
        interrupted = run(20)
    assert interrupted == run(3)
    assert interrupted[0][0][0] == 3
    with interrupted_at(model, 2), pytest.raises(Interrupted):
        run(20)


def test_without_its_attention_a_recommendation_stands(model, stream):
    # Three beginnings of two chunks, in five caches.
    with interrupted_at(model, 3 * 2 * 5 + 1):
        result = sinks.run(model, stream, 64, 512, quiet)
    assert len(result.beginnings) == 3
    assert result.recommended == 1
    assert (result.attention, result.attention_tokens) == (None, 0)
    with interrupted_at(model, 13):
        result = sinks.run(model, stream, 64, 512, quiet)
    assert [each.losses[8].tokens for each in result.beginnings] == [512 - 64]


def test_costs_that_were_measured_are_kept(model):
    settings = latency.Settings((16, 32), (40, 300), 4)
    # At the smaller size: two chunks, then four rounds of two steps of three methods.
    with interrupted_at(model, 2 + 4 * 2 * 3 + 2):
        assert {cost.size for cost in latency.by_window(model, 4, settings, quiet)} == {16}
        assert latency.by_length(model, CacheSize(4, 28), settings, quiet) == []
    with interrupted_at(model, 2), pytest.raises(Interrupted):
        latency.by_window(model, 4, settings, quiet)
    assert np.isfinite([cost.seconds for cost in latency.by_length(model, CacheSize(4, 28), settings, quiet)]).all()


def test_ctrl_c_ends_a_wait_at_once(model, before):
    with interruptible(model) as pressed:
        handler = signal.getsignal(signal.SIGINT)
        with waiting():
            pass
        assert signal.getsignal(signal.SIGINT) is handler
        with pytest.raises(Interrupted), waiting():
            signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        # The next one interrupts what is then done.
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(Interrupted):
            forward(model)
    with pytest.raises(KeyboardInterrupt), waiting():
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_before_a_wait_ends_it_too(model, before):
    """Or a signal between two steps would leave who waits for input waiting."""
    with interruptible(model) as pressed:
        items = awaited(iter([1, 2]), pressed)
        assert next(items) == 1
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted):
            next(items)
    with interruptible(model) as pressed:
        assert list(awaited(iter([1, 2]), pressed)) == [1, 2]
