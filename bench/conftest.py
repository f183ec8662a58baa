"""Fixtures of the benchmarks: interleaved timing of several methods, and a report at the end of the run."""

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

# Prepares a step, which is not timed, and returns the callable that is timed.
NextStep = Callable[[], Callable[[], Any]]

OTHER_WORK = "other work %"


class Marked(float):
    """A figure that is printed with an asterisk; a remark explains it."""


@dataclass
class Summary:
    """Results of all benchmarks of a run, in the order in which they ran."""

    gpu: str | None = None
    """Description of the GPU; None for CPU benchmarks."""
    tables: dict[str, list[tuple[str, dict[str, float]]]] = field(default_factory=lambda: defaultdict(list))
    """Rows by title of the table: shape and figures."""
    targets: dict[str, list[tuple[str, str, bool]]] = field(default_factory=lambda: defaultdict(list))
    """Results by target: shape, figure and whether the target was met."""
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
        yield "Times are medians of several rounds; methods are interleaved in each round."
        yield "x / y: ratio of two times of the same round, median of all rounds."
        if any(OTHER_WORK in figures for rows in self.tables.values() for _, figures in rows):
            yield (
                "other work: CPU time of other processes, in percent of all cores. Above a few percent, do not trust "
                "the times."
            )
        yield from self.remarks
        yield ""
        for target, results in self.targets.items():
            missed = [f"{shape}: {figure}" for shape, figure, met in results if not met]
            yield f"{'MISSED' if missed else 'met   '}  {target}, met in {len(results) - len(missed)} of {len(results)}"
            yield from (f"          {line}" for line in missed)


def _table(rows: list[tuple[str, dict[str, float]]]) -> Iterator[str]:
    columns = [name for name in rows[0][1] if not all(math.isnan(figures[name]) for _, figures in rows)]
    # Column names are printed vertically, one word per line.
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


def _other_processes_seconds() -> float:
    """CPU time of all other processes since boot; NaN without Linux's /proc."""
    if not (stat := Path("/proc/stat")).is_file():
        return math.nan
    user, nice, system, _idle, _iowait, *rest = map(int, stat.read_text().split(maxsplit=9)[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


@dataclass
class Timings:
    """Seconds of every step, in the order of the rounds, by name of the method.

    other_work: CPU time of other processes meanwhile, in percent of all cores.
    """

    seconds: dict[str, list[float]]
    other_work: float

    def ms(self, name: str) -> float:
        """Median in milliseconds; NaN for a method that was not timed."""
        return statistics.median(self.seconds.get(name, [math.nan])) * 1e3

    def figures(self, *names: str) -> dict[str, float]:
        """Columns of a table: other work, and the medians of these methods."""
        return {OTHER_WORK: self.other_work, **{f"{name} ms": self.ms(name) for name in names}}

    def ratio(self, name: str, other: str) -> float:
        """Median over the rounds of ``name / other``, so that a slow round affects both; NaN if one was not timed."""
        if name not in self.seconds or other not in self.seconds:
            return math.nan
        return statistics.median(x / y for x, y in zip(self.seconds[name], self.seconds[other], strict=True))


class Bench:
    """One benchmark: times methods, and keeps the figures for the report and for pytest-benchmark's JSON."""

    def __init__(self, benchmark: Any, summary: Summary) -> None:
        self._benchmark = benchmark
        self._summary = summary
        self.results: list[dict[str, Any]] = []

    def time_interleaved(
        self, methods: dict[str, NextStep], rounds: int, steps: Mapping[str, int] | None = None
    ) -> Timings:
        """Time one step of each method per round.

        pytest-benchmark records the first method, which runs last in each round.

        steps: how many steps a timed callable of each method runs; one if None.
        """
        (own, own_next_step), *others = methods.items()
        seconds: dict[str, list[float]] = {name: [] for name, _ in others}
        rng = random.Random(0)

        def run_others() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
            # In random order, so that no method always runs after the same other one.
            for name, next_step in rng.sample(others, len(others)):
                step = next_step()
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
            return (own_next_step(),), {}

        begin, others_begin = time.perf_counter(), _other_processes_seconds()
        self._benchmark.pedantic(lambda step: step(), setup=run_others, rounds=rounds)
        cores_seconds = (time.perf_counter() - begin) * (os.cpu_count() or 1)
        seconds[own] = list(self._benchmark.stats.stats.data)
        if steps is not None:
            self._benchmark.extra_info["steps_per_turn"] = steps[own]
            seconds = {name: [x / steps[name] for x in times] for name, times in seconds.items()}
        return Timings(seconds, other_work=max(0, 100 * (_other_processes_seconds() - others_begin) / cores_seconds))

    def add_row(self, title: str, shape: str, figures: dict[str, float]) -> None:
        """Add a row to the table of that title; all of its rows have the same columns."""
        known = {name: x for name, x in figures.items() if not math.isnan(x)}
        self._benchmark.extra_info.update(known)
        self.results.append({"title": title, "shape": shape, "figures": known})
        self._summary.tables[title].append((shape, figures))

    def add_target(self, target: str, shape: str, figure: float, met: bool) -> None:
        """Add a result for a target."""
        self._benchmark.extra_info.setdefault("targets_met", {})[target] = met
        self.results.append({"target": target, "shape": shape, "figure": figure, "met": met})
        self._summary.targets[target].append((shape, _text(figure), met))

    def add_remark(self, line: str) -> None:
        """Add a line to the report, unless it is there already."""
        self._summary.remarks[line] = None


SUMMARY = pytest.StashKey[Summary]()


@pytest.fixture
def bench(benchmark, request) -> Iterator[Bench]:
    summary = request.config.stash[SUMMARY]
    bench = Bench(benchmark, summary)
    yield bench
    if (record := request.config.getoption("record")) is None:
        return
    # After each benchmark, so that a run that is cut short leaves its results.
    with Path(f"{record}.jsonl").open("a") as file:
        for result in bench.results:
            file.write(json.dumps({"test": request.node.name, **result}) + "\n")
    Path(f"{record}.txt").write_text("\n".join([*summary.lines(), ""]))


@pytest.fixture
def rehearse(request) -> bool:
    """Whether GPU benchmarks run on the CPU, with tiny shapes."""
    return request.config.getoption("rehearse")


@pytest.fixture
def device(request, rehearse) -> torch.device:
    """Device of the GPU benchmarks, with the memory of the previous benchmark freed."""
    # The traceback of a failed benchmark keeps its tensors alive.
    sys.last_exc = sys.last_value = sys.last_traceback = None
    gc.collect()
    if not rehearse:
        # This may fail after a failed graph capture; there may be enough memory anyhow.
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
    # torch.compile supports more under no_grad than under inference_mode.
    with torch.no_grad() if request.path.name.startswith("gpu_") else torch.inference_mode():
        yield
    torch.set_num_threads(before)


def pytest_addoption(parser):
    group = parser.getgroup("sinkattn")
    group.addoption("--rehearse", action="store_true", help="run GPU benchmarks on the CPU, with tiny shapes")
    group.addoption(
        "--record", type=Path, metavar="PATH", help="write results to PATH.jsonl and PATH.txt after each benchmark"
    )
    group.addoption(
        "--until", type=float, metavar="TIME", help="start no benchmark after this time (as in time.time())"
    )


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
