"""The speed of a model, by a clock that only its forwards move."""

import pytest

from sinkattn.evaluate import speed
from sinkattn.evaluate.speed import Speed


@pytest.mark.parametrize(("step", "token"), [(0.001, 0.00002), (3.0, 0.5)])
def test_speed_is_that_of_forwards(step, token, model, monkeypatch):
    now, forwards = [0.0], []

    def forward(module, args, kwargs):
        tokens = kwargs["input_ids"].numel()
        forwards.append(tokens)
        now[0] += step + tokens * token

    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    hook = model.register_forward_pre_hook(forward, with_kwargs=True)
    try:
        measured = speed.measure_speed(model)
    finally:
        hook.remove()
    # As many tokens as the model was trained for; a slow model is asked once.
    assert set(forwards) == {1, 256}
    assert len(forwards) == (10 if step < 1 else 2)
    assert measured.step == pytest.approx(step + token)
    assert measured.forward(256) == pytest.approx(step + 256 * token, rel=0.01)


def test_forwards_beyond_those_that_were_timed_are_not_underrated():
    measured = Speed(step=1.0, token=0.01, measured=1024)
    assert measured.forward(512) == pytest.approx(6.12)
    assert measured.forward(4096) > 1 + 2 * 40.96
