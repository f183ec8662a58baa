"""What the GPU benchmarks share: steps captured in CUDA graphs, repeated launches, and plain reads and copies."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from conftest import Bench, Marked, Timings
from torch import Tensor

# Seconds that repeated launches should take, so that launch and synchronisation overhead are negligible.
MIN_SECONDS = 0.02
MAX_LAUNCHES = 1_000
REHEARSAL_ROUNDS = 2


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def relative_error(x: Tensor, expected: Tensor) -> float:
    """RMS of the difference, relative to the RMS of ``expected``; infinite if there are NaN or infinities."""
    x, expected = x.float(), expected.float()
    error = (x - expected).norm() / expected.norm()
    return error.item() if error.isfinite() else math.inf


@dataclass
class RepeatedLaunch:
    """A launch of ``layers`` steps, captured in a CUDA graph if ``capture``, repeated before one synchronisation."""

    launch: Callable[[], Any]
    device: torch.device
    layers: int = 1
    capture: bool = True
    capture_error: str | None = None
    """Why it was not captured."""
    repeats: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        self.uncaptured = self.launch  # keeps its tensors alive
        if self.device.type == "cpu":
            self.capture = False
        if self.capture:
            try:
                self.launch = capture_graph(self.launch)
            except Exception as error:
                self.capture_error, self.capture = first_line(error), False
        self.run()
        once = min(self._seconds() for _ in range(2))
        if self.device.type == "cuda":
            self.repeats = max(1, min(MAX_LAUNCHES, math.ceil(MIN_SECONDS / once)))
        self.run()

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    @property
    def steps(self) -> int:
        """Steps of one call of `run`."""
        return self.repeats * self.layers

    def next_step(self) -> Callable[[], None]:
        return self.run

    def run(self) -> None:
        for _ in range(self.repeats):
            self.launch()
        synchronise(self.device)


def capture_graph(launch: Callable[[], Any]) -> Callable[[], None]:
    """Capture ``launch`` in a CUDA graph, after two warm-up runs that compile kernels; returns the graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


class Comparison:
    """Methods that are timed at one shape. A baseline that cannot run is left out; a remark says why."""

    def __init__(self, bench: Bench, device: torch.device, shape: str) -> None:
        self.bench, self.device, self.shape = bench, device, shape
        self.methods: dict[str, RepeatedLaunch] = {}
        self.mismatches: list[str] = []

    def add(self, name: str, launch: Callable[[], Any], layers: int = 1, *, capture: bool = True) -> None:
        method = RepeatedLaunch(launch, self.device, layers, capture)
        if method.capture_error:
            self.bench.add_remark(f"{name}, {self.shape}: no CUDA graph: {method.capture_error}")
        self.methods[name] = method

    def try_add(self, name: str, add: Callable[[], Any]) -> None:
        """Add a baseline with ``add``; if that raises an error, a remark says why it is left out."""
        try:
            add()
        except ModuleNotFoundError as error:
            self.bench.add_remark(f"{name}: not installed: {error.name}")
        except Exception as error:
            self.bench.add_remark(f"{name}, {self.shape}: left out: {first_line(error)}")

    def check_output(self, name: str, error: float, max_error: float) -> bool:
        """Whether an output is right; if not, `assert_outputs_match` fails at the end of the benchmark."""
        if error <= max_error:
            return True
        self.mismatches.append(f"{name}, {self.shape}: differs from sinkattn by {error:.1e} of the output")
        self.bench.add_remark(f"{self.mismatches[-1]} (allowed: {max_error:.1e}): left out")
        return False

    def time_interleaved(self, rounds: int) -> Timings:
        rounds = rounds if self.device.type == "cuda" else REHEARSAL_ROUNDS
        methods = {name: method.next_step for name, method in self.methods.items()}
        steps = {name: method.steps for name, method in self.methods.items()}
        return self.bench.time_interleaved(methods, rounds, steps)

    def median_step(self, timings: Timings, name: str, unit: float = 1e-6) -> float:
        """Median time of a step in seconds / ``unit``, marked if it includes launches from Python."""
        x = timings.ms(name) * 1e-3 / unit
        if self.device.type == "cuda" and name in self.methods and not self.methods[name].capture:
            self.bench.add_remark("*: not captured in a CUDA graph; the time includes launches from Python.")
            return Marked(x)
        return x

    def assert_outputs_match(self) -> None:
        assert not self.mismatches, self.mismatches


def add_read(comparison: Comparison) -> int:
    """Add a plain read of memory, the sum of a tensor, as ``read``; returns the bytes that it reads."""
    source = _large(comparison.device)
    comparison.add("read", source.sum)
    return source.nbytes


def add_copy(comparison: Comparison) -> int:
    """Add a plain copy of memory as ``copy``; returns the bytes that it reads and writes.

    It is a kernel: a memcpy node of a CUDA graph is slower, as it need not run on the multiprocessors.
    """
    source = _large(comparison.device)
    comparison.add("copy", partial(torch.neg, source, out=torch.empty_like(source)))
    return 2 * source.nbytes


def _large(device: torch.device) -> Tensor:
    """Much larger than any cache on a GPU."""
    return torch.ones(2**28 if device.type == "cuda" else 2**14, device=device)
