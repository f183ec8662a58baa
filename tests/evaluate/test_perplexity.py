"""Loss along a stream: means over the right tokens, the shape of the paper's results, memory that does not grow."""

import io
from copy import deepcopy

import naive
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sinkattn.evaluate import perplexity
from sinkattn.evaluate.interruption import Interrupted
from sinkattn.evaluate.methods import CacheSize
from sinkattn.evaluate.perplexity import Settings, Timing
from sinkattn.evaluate.text import Pipe, StandardLibrary, TextError, TokenStream

pytestmark = pytest.mark.usefixtures("few_timed_tokens")

CACHES = (CacheSize(0, 64), CacheSize(4, 60))


def quiet(*progress):
    pass


@pytest.fixture(scope="module")
def expected(model, ids):
    model64 = deepcopy(model).double()
    losses = {str(cache): naive.losses(model64, ids, cache.num_sinks, cache.window) for cache in CACHES}
    losses["recomputed 64"] = naive.recomputed_losses(model, ids, 64, keep_first=True, every=5)
    losses["dense"] = naive.losses(model64, ids[:701], 0, 701)
    return {name: each.double().numpy() for name, each in losses.items()}


@pytest.fixture(scope="module")
def result(model, tokenizer):
    stream = TokenStream(StandardLibrary(), tokenizer)
    settings = Settings(CACHES, tokens=2000, dense_tokens=700, recompute_every=5)
    return perplexity.run(model, stream, settings, quiet)


def test_means_over_2000_tokens_are_those_of_a_naive_reference(result, expected):
    """To 1e-4 nats: gathered keys and values rotated anew in fp64, and a forward of transformers for every token."""
    begin = 64
    sampled = np.arange(2000) % 5 == 0
    sampled[:begin] = False
    assert [track.method.name for track in result.tracks] == ["0+64", "4+60", "recomputed 64", "dense"]
    for track in result.tracks:
        losses = expected[track.method.name]
        every = sampled if track.method.name == "recomputed 64" else np.arange(2000) >= begin
        end = 700 if track.method.name == "dense" else 2000
        assert track.end == end
        for mean, low, high in ((track.all.mean(), begin, end), (track.early.mean(), begin, 700)):
            part = losses[low:high][every[low:high]]
            assert mean.tokens == len(part)
            assert mean.loss == pytest.approx(part.mean(), abs=1e-4)
        assert track.sampled.mean().loss == pytest.approx(losses[:end][sampled[:end]].mean(), abs=1e-4)


def test_series_covers_every_token_fed(result, expected):
    for track in result.tracks:
        rows = track.series.means()
        if track.method.name == "recomputed 64":
            continue
        assert sum(tokens for _, _, tokens, _ in rows) == track.end
        total = sum(tokens * loss for _, _, tokens, loss in rows)
        assert total / track.end == pytest.approx(expected[track.method.name][: track.end].mean(), abs=1e-4)


def test_recomputation_is_estimated_by_what_differs_from_a_streamed_method(result, expected):
    *streamed, recomputed, dense = result.tracks
    streams, recomputes = expected["4+60"], expected["recomputed 64"]
    for (begin, end, tokens, loss), raw in zip(result.estimates(recomputed), recomputed.series.means(), strict=True):
        sampled = [i for i in range(max(begin, 64), end) if i % 5 == 0]
        assert (begin, end, tokens) == (*raw[:2], len(sampled))
        wanted = streams[begin:end].mean() + (recomputes - streams)[sampled].mean()
        assert loss == pytest.approx(wanted, abs=1e-4)
        assert loss != pytest.approx(raw[3], abs=1e-3)
    assert not any(map(result.estimates, (*streamed, dense)))


def test_each_layout_is_compared_with_recomputation_of_its_size(result, expected):
    sampled = np.flatnonzero((np.arange(2000) % 5 == 0) & (np.arange(2000) >= 64))
    for track in result.tracks[:2]:
        other = result.recomputed(track)
        assert other.method.name == "recomputed 64"
        difference = track.sampled.difference(other.sampled)
        wanted = (expected[track.method.name] - expected["recomputed 64"])[sampled].mean()
        assert difference.loss == pytest.approx(wanted, abs=1e-4)
        assert difference.margin < 0.3
    assert all(result.recomputed(track) is None for track in result.tracks[2:])


def test_costs_are_measured(result):
    assert all(track.seconds > 0 for track in result.tracks)
    kept = {track.method.name: track.kv_bytes for track in result.tracks}
    assert kept == {"0+64": 64 * 2048, "4+60": 64 * 2048, "recomputed 64": None, "dense": 700 * 2048}


def test_times_are_medians_of_turns(monkeypatch):
    """By a clock that only the methods' steps move."""
    now = [0.0]
    monkeypatch.setattr(perplexity.time, "perf_counter", lambda: now[0])
    order = []

    class Method:
        def __init__(self, name, times):
            self.name, self.times = name, iter(times)

        def step(self, token):
            order.append(self.name)
            now[0] += next(self.times)

    first, second = Method("a", [50, 1, 50, 2, 50, 9]), Method("b", [50, 5, 50, 4, 50, 4])
    assert perplexity.time_interleaved([first, second], 0, 3) == Timing([2, 4], 3)
    # A step before each that is timed.
    assert order.count("a") == order.count("b") == 2 * 3
    assert {"".join(order[i : i + 4]) for i in range(0, len(order), 4)} == {"aabb", "bbaa"}


def test_models_with_few_positions_run_without_dense(tokenizer):
    config = GPT2Config(vocab_size=1024, n_positions=40, n_embd=16, n_layer=1, n_head=2)
    absolute = GPT2LMHeadModel(config).eval()
    text = Pipe(io.StringIO("import os\n" * 40))
    for cache, expected in ((CacheSize(2, 20), 39), (CacheSize(4, 36), None)):
        settings = Settings((cache,), tokens=200, dense_tokens=100, recompute_every=0)
        tracks = perplexity.run(absolute, TokenStream(text, tokenizer), settings, quiet).tracks
        assert [track.end for track in tracks if track.method.name == "dense"] == ([expected] if expected else [])
        assert tracks[0].kv_bytes > 0


@pytest.mark.slow
def test_the_shape_of_the_papers_result(model, stream):
    """Dense fails past the trained length, a window alone collapses, sinks do as well as recomputation."""
    caches = (CacheSize(0, 128), CacheSize(1, 127), CacheSize(4, 124))
    settings = Settings(caches, tokens=12_000, dense_tokens=2_000, recompute_every=8)
    tracks = {track.method.name: track for track in perplexity.run(model, stream, settings, quiet).tracks}
    early = {name: track.early.mean().perplexity for name, track in tracks.items()}
    assert early["dense"] > 10 * early["4+124"]
    recomputed = tracks["recomputed 128"].sampled
    for name in ("1+127", "4+124"):
        assert abs(tracks[name].sampled.difference(recomputed).loss) < 0.02
    window = tracks["0+128"].sampled.difference(recomputed)
    assert window.loss - window.margin > 0.5


def test_recomputation_without_start_token_takes_the_last_tokens_alone(model, tokenizer, ids):
    text = tokenizer.decode(ids[1:400])
    stream = TokenStream(Pipe(io.StringIO(text)), tokenizer, with_start=False)
    settings = Settings((CacheSize(4, 28),), tokens=200, dense_tokens=0, recompute_every=1)
    run = perplexity.run(model, stream, settings, quiet)
    expected = naive.recomputed_losses(model, ids[1:202], 32, keep_first=False)[32:200].mean()
    assert run.tracks[1].all.mean().loss == pytest.approx(float(expected), abs=1e-4)


def test_methods_can_be_left_out(model, stream):
    settings = Settings((CacheSize(1, 31),), tokens=300, dense_tokens=0, recompute_every=0)
    assert [track.method.name for track in perplexity.run(model, stream, settings, quiet).tracks] == ["1+31"]


def test_progress_is_told_after_every_chunk(model, stream):
    done = []
    settings = Settings((CacheSize(1, 31),), tokens=600, dense_tokens=0, recompute_every=0)
    perplexity.run(model, stream, settings, lambda tokens, tracks: done.append(tokens))
    assert done == [256, 512, 600]


def test_rounds_end_with_the_time_that_there_is(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(perplexity.time, "perf_counter", lambda: now[0])

    class Method:
        def step(self, token):
            now[0] += 1

    assert perplexity.time_interleaved([Method(), Method()], 0, 50, 30).rounds == 8
    assert perplexity.time_interleaved([Method()], 0, 50, 0.5).rounds == 3
    assert perplexity.time_interleaved([Method()], 0, 50).rounds == 50
    for rounds, seconds in ((50, 30), (50, 0.5), (5, 30)):
        began = now[0]
        perplexity.time_interleaved([Method()], 0, rounds, seconds)
        assert now[0] - began == pytest.approx(perplexity.timing_seconds(1, rounds, seconds), abs=2)


def test_a_stream_may_be_ended_early(model, stream, expected):
    settings = Settings(CACHES, tokens=2000, dense_tokens=700, recompute_every=5)

    def end(done, tracks):
        if done >= 1000:
            raise Interrupted

    result = perplexity.run(model, stream, settings, end)
    assert result.settings.tokens == 1024
    for track in result.tracks[:2]:
        mean = expected[track.method.name][64:1024].mean()
        assert (track.end, track.all.mean().tokens) == (1024, 960)
        assert track.all.mean().loss == pytest.approx(mean, abs=1e-4)
        assert track.sampled.difference(result.recomputed(track).sampled).tokens == 192
        assert (track.seconds, track.kv_bytes) == (None, 64 * 2048)

    def end_at_once(done, tracks):
        raise Interrupted

    with pytest.raises(Interrupted):
        perplexity.run(model, stream, Settings((CacheSize(4, 252),), tokens=2000, dense_tokens=0), end_at_once)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caches": ()}, "cache: expected at least one"),
        ({"tokens": 64}, r"tokens: expected more than sinks \+ window \(64\), got 64"),
        ({"dense_tokens": 30}, r"dense_tokens: expected more than sinks \+ window \(64\), got 30"),
        ({"recompute_every": -1}, "recompute_every: expected 0 to 1936"),
        ({"recompute_every": 1937}, "recompute_every: expected 0 to 1936, or no token is hit, got 1937"),
        ({"caches": (CacheSize(4, 300),)}, "must not exceed the 256 positions it was trained for, got 304"),
    ],
)
def test_settings_that_leave_nothing_to_compare_are_refused(changes, message, model, stream):
    settings = Settings(**{"caches": CACHES, "tokens": 2000, "dense_tokens": 700, **changes})
    with pytest.raises(ValueError, match=message):
        perplexity.run(model, stream, settings, quiet)


def test_an_empty_text_is_refused(model, tokenizer):
    stream = TokenStream(Pipe(io.StringIO("")), tokenizer)
    with pytest.raises(TextError, match="stdin is empty"):
        perplexity.run(model, stream, Settings(CACHES, tokens=100, dense_tokens=0), quiet)


def test_chunks_cut_a_stream_anywhere():
    parts = list(perplexity.chunks(iter(range(1000)), 600))
    assert [first for first, _, _ in parts] == [0, 256, 512]
    assert torch.equal(torch.cat([fed for _, fed, _ in parts]), torch.arange(600))
    assert torch.equal(torch.cat([targets for _, _, targets in parts]), torch.arange(1, 601))
