"""What the GPU benchmarks share: steps captured in CUDA graphs, turns of many steps, and a plain copy as a measure."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from conftest import Bench, Marked, Turns
from torch import Tensor

# Long enough for what a launch and a wait cost to be nothing beside it.
TURN_SECONDS = 0.02
MOST_LAUNCHES = 1_000
ROUNDS_REHEARSED = 2


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def relative_error(x: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what was expected; NaN and infinities count as wrong."""
    x, expected = x.float(), expected.float()
    error = (x - expected).norm() / expected.norm()
    return error.item() if error.isfinite() else math.inf


@dataclass
class Repeated:
    """A launch of ``layers`` steps, captured in a CUDA graph if ``capture``, over and over: one turn, then a wait."""

    launch: Callable[[], Any]
    device: torch.device
    layers: int = 1
    capture: bool = True
    why_not: str | None = None
    """Why it was not captured."""
    launches: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        self.keep = self.launch
        if self.device.type == "cpu":
            self.capture = False
        if self.capture:
            try:
                self.launch = captured(self.launch)
            except Exception as error:
                self.why_not, self.capture = first_line(error), False
        self.run()
        once = min(self._seconds() for _ in range(2))
        if self.device.type == "cuda":
            self.launches = max(1, min(MOST_LAUNCHES, math.ceil(TURN_SECONDS / once)))
        self.run()

    def _seconds(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    @property
    def steps(self) -> int:
        """Steps of a turn."""
        return self.launches * self.layers

    def turn(self) -> Callable[[], None]:
        return self.run

    def run(self) -> None:
        for _ in range(self.launches):
            self.launch()
        synchronise(self.device)


def captured(launch: Callable[[], Any]) -> Callable[[], None]:
    """Replay of a CUDA graph of what ``launch`` launches; it is run twice before, to compile what it compiles."""
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


class Ways:
    """What is timed in turns at one shape. A peer that cannot run is left out, with a remark that says why."""

    def __init__(self, bench: Bench, device: torch.device, shape: str) -> None:
        self.bench, self.device, self.shape = bench, device, shape
        self.repeated: dict[str, Repeated] = {}
        self.mismatches: list[str] = []

    def add(self, name: str, launch: Callable[[], Any], layers: int = 1, *, capture: bool = True) -> None:
        repeated = Repeated(launch, self.device, layers, capture)
        if repeated.why_not:
            self.bench.remark(f"{name}, {self.shape}: no CUDA graph: {repeated.why_not}")
        self.repeated[name] = repeated

    def try_to(self, name: str, add: Callable[[], Any]) -> None:
        """Add a peer by ``add``, if that works."""
        try:
            add()
        except ModuleNotFoundError as error:
            self.bench.remark(f"{name}: not installed: {error.name}")
        except Exception as error:
            self.bench.remark(f"{name}, {self.shape}: left out: {first_line(error)}")

    def check(self, name: str, error: float, most: float) -> bool:
        """Whether an output is right; the benchmark fails at its end if one is not."""
        if error <= most:
            return True
        self.mismatches.append(f"{name}, {self.shape}: differs from sinkattn by {error:.1e} of the output")
        self.bench.remark(f"{self.mismatches[-1]} (allowed: {most:.1e}): left out")
        return False

    def in_turns(self, rounds: int) -> Turns:
        rounds = rounds if self.device.type == "cuda" else ROUNDS_REHEARSED
        ways = {name: repeated.turn for name, repeated in self.repeated.items()}
        return self.bench.in_turns(ways, rounds, {name: repeated.steps for name, repeated in self.repeated.items()})

    def time(self, turns: Turns, name: str, unit: float = 1e-6) -> float:
        """Median of a step, marked if its launches were timed as well."""
        x = turns.ms(name) * 1e-3 / unit
        if self.device.type == "cuda" and name in self.repeated and not self.repeated[name].capture:
            self.bench.remark("*: not captured in a CUDA graph: launched from Python, which is part of the time.")
            return Marked(x)
        return x

    def done(self) -> None:
        assert not self.mismatches, self.mismatches


def add_copy(ways: Ways) -> int:
    """Add a plain copy, as ``copy``; the bytes that a step of it reads and writes."""
    count = 2**30 if ways.device.type == "cuda" else 2**16
    source = torch.randint(256, (count,), dtype=torch.uint8, device=ways.device)
    ways.add("copy", partial(torch.empty_like(source).copy_, source))
    return 2 * count
