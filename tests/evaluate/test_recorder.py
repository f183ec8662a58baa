"""The recorder: which tokens its figures are of, in memory that does not grow with the stream."""

import sys

import numpy as np

from sinkattn.evaluate import recorder
from sinkattn.evaluate.recorder import Recorder, sample_positions


def fill(tokens, full_at=10, times=None, samples=()):
    out = Recorder(tokens, full_at, np.array(samples, dtype=np.int64))
    for position in range(tokens):
        out.add(position, float(position), times(position) if times else None)
    return out


def test_spans_are_the_tokens_after_the_window_filled_and_the_last(monkeypatch):
    monkeypatch.setattr(recorder, "MAX_TIMES", 7)
    out = fill(100, full_at=10, times=float)
    assert out.first_span() == recorder.Span(10, 7, 13.0)
    assert out.last_span() == recorder.Span(93, 7, 96.0)
    short = fill(20, full_at=10, times=float)
    assert (short.first_span(), short.last_span()) == (recorder.Span(10, 5, 12.0), recorder.Span(15, 5, 17.0))
    assert fill(10, full_at=10, times=float).last_span() is None


def test_resident_growth_is_the_highest_after_the_window_filled():
    out = Recorder(200, 10, np.zeros(0))
    readings = {0: 999, 10: 100, 32: 130, 64: 170, 96: 120}
    for position in range(200):
        out.add(position, 0.0)
        if out.memory_is_due():
            out.add_memory(readings.get(position, 110), 5)
    assert (out.resident_when_full, out.resident_growth) == (100, 70)


def test_samples_are_spread_and_distinct():
    rng = np.random.default_rng(0)
    positions = sample_positions(100, 1100, 50, rng)
    assert ((positions - 100) // 20 == np.arange(50)).all()
    assert sample_positions(5, 9, 50, rng).tolist() == [5, 6, 7, 8]
    assert len(sample_positions(9, 9, 50, rng)) == 0


def test_mean_loss_of_samples():
    out = fill(50, samples=[3, 10, 20, 45])
    assert out.mean_loss(10, 45) == (15.0, 2)
    assert out.mean_loss(21, 45) is None


def test_recorder_takes_the_same_memory_for_any_stream():
    def nbytes(tokens):
        out = Recorder(tokens, 128, np.zeros(0))
        return sum(value.nbytes for value in vars(out).values() if isinstance(value, np.ndarray))

    assert nbytes(10**9) == nbytes(10**5)
    assert nbytes(10**9) < 1 << 20
    out = Recorder(10**9, 128, np.zeros(0))
    before = sum(sys.getsizeof(value) for value in vars(out).values())
    for position in range(20_000):
        out.add(position, 1.0, 1.0)
    assert sum(sys.getsizeof(value) for value in vars(out).values()) <= before + 64
