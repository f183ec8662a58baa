"""Progress: lines where stderr is no terminal, bars where it is."""

import re
import time

import pytest

from sinkattn.cli import progress
from sinkattn.cli.progress import StreamProgress


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def work(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with StreamProgress() as running:
        time.sleep(0.12)
        bar = running.add("tokens", 1000)
        bar(250, "4+28 2.345")
        time.sleep(0.2)


def test_without_a_terminal_lines_say_how_far_it_is(monkeypatch, capsys):
    work(monkeypatch)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "after 0 seconds: nothing done yet"
    line = r"after 0 seconds: tokens: 250 of 1,000, about [01] seconds? left of it  4\+28 2\.345"
    assert any(re.fullmatch(line, each) for each in lines), lines


def test_a_terminal_gets_bars_alone(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    work(monkeypatch)
    shown = capsys.readouterr().err
    assert "250" in shown
    assert "left of it" not in shown
    assert "nothing done yet" not in shown
