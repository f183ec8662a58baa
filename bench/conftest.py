"""What the benchmarks share: ways timed in turns, and one report of the whole run when it ends."""

import gc
import json
import math
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkattn.evaluate.environment import machine, versions

THREADS = min(2, os.cpu_count() or 1)

# Prepares a turn, which is not timed, and returns what is timed.
Turn = Callable[[], Callable[[], Any]]


OTHER_WORK = "other work %"


class Marked(float):
    """A figure with an asterisk, which a remark explains."""


@dataclass
class Summary:
    """What the benchmarks of a run found, in the order in which they ran."""

    gpu: str | None = None
    """What they ran on, unless that is the processor."""

    tables: dict[str, list[tuple[str, dict[str, float]]]] = field(default_factory=lambda: defaultdict(list))
    """By title: shape and figures of each row."""
    targets: dict[str, list[tuple[str, str, bool]]] = field(default_factory=lambda: defaultdict(list))
    """By target: shape, figure and whether it was met."""
    remarks: dict[str, None] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        about = {**machine(), **versions()}
        yield f"{about['processor']}, {about['cores']} cores, {THREADS} threads"
        if self.gpu:
            yield self.gpu
        yield ", ".join(f"{name} {about[name]}" for name in ("sinkattn", "torch", "transformers", "python"))
        for title, rows in self.tables.items():
            yield from ("", title, "", *_table(rows))
        yield ""
        yield "Times are medians of several rounds, in each of which every way has its turn."
        yield "x / y: quotient of two times of the same round, median of all rounds."
        if any(OTHER_WORK in figures for rows in self.tables.values() for _, figures in rows):
            yield "other work: processor time of other processes, of all cores. Not to be trusted above a few percent."
        yield from self.remarks
        yield ""
        for target, results in self.targets.items():
            missed = [f"{shape}: {figure}" for shape, figure, met in results if not met]
            yield f"{'MISSED' if missed else 'met   '}  {target}, met in {len(results) - len(missed)} of {len(results)}"
            yield from (f"          {line}" for line in missed)


def _table(rows: list[tuple[str, dict[str, float]]]) -> Iterator[str]:
    columns = [name for name in rows[0][1] if not all(math.isnan(figures[name]) for _, figures in rows)]
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
    return (f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}") + "*" * isinstance(x, Marked)


def _others_seconds() -> float:
    """Processor time of everything but this process so far; NaN where Linux is not there to tell."""
    if not (stat := Path("/proc/stat")).is_file():
        return math.nan
    user, nice, system, _idle, _iowait, *rest = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


@dataclass
class Turns:
    """Seconds of every step, round by round, by the name of what was timed.

    other_work: percentage of all cores' time that went to other processes meanwhile.
    """

    seconds: dict[str, list[float]]
    other_work: float

    def ms(self, name: str) -> float:
        """Median in milliseconds; NaN for what was not timed."""
        return statistics.median(self.seconds.get(name, [math.nan])) * 1e3

    def figures(self, *names: str) -> dict[str, float]:
        """Columns of a table: the medians, and how much else the machine did."""
        return {OTHER_WORK: self.other_work, **{f"{name} ms": self.ms(name) for name in names}}

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
        self.results: list[dict[str, Any]] = []

    def in_turns(self, ways: dict[str, Turn], rounds: int, steps: Mapping[str, int] | None = None) -> Turns:
        """One turn of each way per round. The first is what pytest-benchmark records; the last one in each round.

        steps: how many a turn of each way has; one each when None.
        """
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
        seconds[ours] = list(self._benchmark.stats.stats.data)
        if steps is not None:
            self._benchmark.extra_info["steps_per_turn"] = steps[ours]
            seconds = {name: [x / steps[name] for x in times] for name, times in seconds.items()}
        return Turns(seconds, other_work=max(0, 100 * (_others_seconds() - others_begin) / cores_seconds))

    def note(self, title: str, shape: str, figures: dict[str, float]) -> None:
        """Add a row to the table of that title; its rows have the same columns."""
        known = {name: x for name, x in figures.items() if not math.isnan(x)}
        self._benchmark.extra_info.update(known)
        self.results.append({"title": title, "shape": shape, "figures": known})
        self._summary.tables[title].append((shape, figures))

    def target(self, target: str, shape: str, figure: float, met: bool) -> None:
        """Say whether a target was met."""
        self._benchmark.extra_info.setdefault("targets_met", {})[target] = met
        self.results.append({"target": target, "shape": shape, "figure": figure, "met": met})
        self._summary.targets[target].append((shape, _text(figure), met))

    def remark(self, line: str) -> None:
        """Add a line to the report, unless it is there."""
        self._summary.remarks[line] = None


SUMMARY = pytest.StashKey[Summary]()


@pytest.fixture
def bench(benchmark, request) -> Iterator[Bench]:
    summary = request.config.stash[SUMMARY]
    bench = Bench(benchmark, summary)
    yield bench
    if (record := request.config.getoption("record")) is None:
        return
    # As each benchmark ends, so that a run that is cut short leaves what it found.
    with Path(f"{record}.jsonl").open("a") as file:
        for result in bench.results:
            file.write(json.dumps({"test": request.node.name, **result}) + "\n")
    Path(f"{record}.txt").write_text("\n".join([*summary.lines(), ""]))


@pytest.fixture
def rehearse(request) -> bool:
    """Whether GPU benchmarks run on the CPU, on tiny shapes."""
    return request.config.getoption("rehearse")


@pytest.fixture
def device(request, rehearse) -> torch.device:
    """Where GPU benchmarks run, with nothing of the benchmark before left in its memory."""
    # A failure's traceback keeps all that its benchmark had.
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()
    if not rehearse:
        # After a capture that failed the allocator may refuse; there may be room without.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
    request.config.stash[SUMMARY].gpu = "rehearsed on the CPU: no figure here means anything" if rehearse else _gpu()
    return torch.device("cpu" if rehearse else "cuda")


def _gpu() -> str:
    properties = torch.cuda.get_device_properties("cuda")
    memory, l2 = properties.total_memory / 2**30, properties.L2_cache_size / 2**20
    return f"{properties.name}, {memory:.0f} GiB, {l2:.0f} MiB of L2 cache, CUDA {torch.version.cuda}"


@pytest.fixture(autouse=True)
def inference_on_few_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.config.getoption("rehearse") else THREADS)
    # torch.compile sees more of what is done under no_grad.
    with torch.no_grad() if request.path.name.startswith("gpu_") else torch.inference_mode():
        yield
    torch.set_num_threads(before)


def pytest_addoption(parser):
    group = parser.getgroup("sinkattn")
    group.addoption("--rehearse", action="store_true", help="run GPU benchmarks on the CPU, on tiny shapes")
    group.addoption("--record", type=Path, metavar="PATH", help="keep results in PATH.jsonl and PATH.txt as they come")
    group.addoption("--until", type=float, metavar="TIME", help="begin no benchmark after this time (of time.time)")


def pytest_configure(config):
    config.stash[SUMMARY] = Summary()


def pytest_runtest_setup(item):
    until = item.config.getoption("until")
    if until is not None and time.time() > until:
        item.config.stash[SUMMARY].remarks[f"{item.name}: not run, out of time"] = None
        pytest.skip("out of time")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {**machine(), **versions(), "threads": THREADS}


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.stash[SUMMARY].tables:
        terminalreporter.section("sinkattn")
        for line in config.stash[SUMMARY].lines():
            terminalreporter.write_line(line)
