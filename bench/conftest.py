"""What the benchmarks share: ways timed in turns, and one report of the whole run when it ends."""

import math
import os
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkattn.report import machine, versions

THREADS = min(2, os.cpu_count() or 1)

# Prepares a turn, which is not timed, and returns what is timed.
Turn = Callable[[], Callable[[], Any]]


@dataclass
class Summary:
    """What the benchmarks of a run found, in the order in which they ran."""

    tables: dict[str, list[tuple[str, dict[str, float]]]] = field(default_factory=lambda: defaultdict(list))
    """By title: shape and figures of each row."""
    targets: dict[str, list[tuple[str, str, bool]]] = field(default_factory=lambda: defaultdict(list))
    """By target: shape, figure and whether it was met."""
    remarks: dict[str, None] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        about = {**machine(), **versions()}
        yield f"{about['processor']}, {about['cores']} cores, {THREADS} threads"
        yield ", ".join(f"{name} {about[name]}" for name in ("sinkattn", "torch", "transformers", "python"))
        for title, rows in self.tables.items():
            yield from ("", title, "", *_table(rows))
        yield ""
        yield "Times are medians of several rounds, in each of which every way has its turn."
        yield "x / y: quotient of two times of the same round, median of all rounds."
        yield "other work: processor time of other processes, of all cores. Not to be trusted above a few percent."
        yield from self.remarks
        yield ""
        for target, results in self.targets.items():
            missed = [f"{shape}: {figure}" for shape, figure, met in results if not met]
            yield f"{'MISSED' if missed else 'met   '}  {target}, met in {len(results) - len(missed)} of {len(results)}"
            yield from (f"          {line}" for line in missed)


def _table(rows: list[tuple[str, dict[str, float]]]) -> Iterator[str]:
    columns = list(rows[0][1])
    # A column's name goes from top to bottom, a word on each line.
    names = [name.replace(" /", "/").split() for name in columns]
    height = max(map(len, names))
    heads = [["", *line] for line in zip(*([""] * (height - len(name)) + name for name in names), strict=True)]
    lines = heads + [[shape, *(_text(figures[column]) for column in columns)] for shape, figures in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        yield "  ".join([first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(rest, widths[1:], strict=True))])


def _text(x: float) -> str:
    if math.isnan(x):
        return "-"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _others_seconds() -> float:
    """Processor time of everything but this process so far; NaN where Linux is not there to tell."""
    if not (stat := Path("/proc/stat")).is_file():
        return math.nan
    user, nice, system, _idle, _iowait, *rest = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


@dataclass
class Turns:
    """Seconds of every turn, round by round, by the name of what was timed.

    other_work: percentage of all cores' time that went to other processes meanwhile.
    """

    seconds: dict[str, list[float]]
    other_work: float

    def ms(self, name: str) -> float:
        """Median in milliseconds; NaN for what was not timed."""
        return statistics.median(self.seconds.get(name, [math.nan])) * 1e3

    def figures(self, *names: str) -> dict[str, float]:
        """Columns of a table: the medians, and how much else the machine did."""
        return {"other work %": self.other_work, **{f"{name} ms": self.ms(name) for name in names}}

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of ``name / other``, so that a slow moment hits both; NaN for what was not timed."""
        if name not in self.seconds or other not in self.seconds:
            return math.nan
        return statistics.median(x / y for x, y in zip(self.seconds[name], self.seconds[other], strict=True))


class Bench:
    """One benchmark: times in turns, and keeps the figures for the report and for pytest-benchmark's JSON."""

    def __init__(self, benchmark: Any, summary: Summary) -> None:
        self._benchmark = benchmark
        self._summary = summary

    def in_turns(self, ways: dict[str, Turn], rounds: int) -> Turns:
        """One turn of each way per round. The first is what pytest-benchmark records; the last one in each round."""
        (ours, our_turn), *others = ways.items()
        seconds: dict[str, list[float]] = {name: [] for name, _ in others}
        shuffled = random.Random(0)

        def run_others() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
            # In changing order, so that none always runs in the wake of the same other.
            for name, turn in shuffled.sample(others, len(others)):
                step = turn()
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
            return (our_turn(),), {}

        begin, others_begin = time.perf_counter(), _others_seconds()
        self._benchmark.pedantic(lambda step: step(), setup=run_others, rounds=rounds)
        cores_seconds = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        seconds[ours] = self._benchmark.stats.stats.data
        return Turns(seconds, other_work=max(0, 100 * (_others_seconds() - others_begin) / cores_seconds))

    def note(self, title: str, shape: str, figures: dict[str, float]) -> None:
        """Add a row to the table of that title; its rows have the same columns."""
        self._benchmark.extra_info.update({name: x for name, x in figures.items() if not math.isnan(x)})
        self._summary.tables[title].append((shape, figures))

    def target(self, target: str, shape: str, figure: float, met: bool) -> None:
        """Say whether a target was met."""
        self._benchmark.extra_info.setdefault("targets_met", {})[target] = met
        self._summary.targets[target].append((shape, _text(figure), met))

    def remark(self, line: str) -> None:
        """Add a line to the report, unless it is there."""
        self._summary.remarks[line] = None


SUMMARY = pytest.StashKey[Summary]()


@pytest.fixture
def bench(benchmark, request) -> Bench:
    return Bench(benchmark, request.config.stash[SUMMARY])


@pytest.fixture(autouse=True)
def inference_on_few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def pytest_configure(config):
    config.stash[SUMMARY] = Summary()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {**machine(), **versions(), "threads": THREADS}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.stash[SUMMARY].tables:
        terminalreporter.section("sinkattn")
        for line in config.stash[SUMMARY].lines():
            terminalreporter.write_line(line)
