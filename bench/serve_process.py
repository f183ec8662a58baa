"""The servers of `bench_serve.py`, each in a process of its own."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

START_SECONDS = 180
# Tokens in a block of keys and values of continuous batching, and in one of its forwards.
BLOCK, BATCH = 32, 512


class ServerFailed(Exception):
    """A server does not run; the message is one line."""


@dataclass(frozen=True)
class Kind:
    """A server that is measured.

    Attributes:
        name: of it.
        does: what it does with the history of a request.
        keeps: whether it keeps keys and values from one request to the next.
        options: arguments to Python, after which come ``--port`` and the port.
    """

    name: str
    does: str
    keeps: bool
    options: tuple[str, ...]


def sinkattn_serve(folder: Path, *, streams: int, window: int | None = None) -> Kind:
    """sinkattn's server of a model, for so many streams; ``window``: None for its default."""
    sizes = ["--max-prefix", "64", "--max-streams", str(streams), "--max-parked", "0"]
    if window is not None:
        sizes += ["--window", str(window)]
    # With its penalty the likeliest token would be another one.
    greedy = ("--temperature", "0", "--repetition-penalty", "1", "--min-p", "0")
    return Kind(
        "sinkattn serve",
        "keeps a stream of each chat, and computes what is new, of all chats together",
        True,
        ("-m", "sinkattn", "serve", str(folder), "--name", str(folder), "--device", "cpu", *sizes, *greedy),
    )


def transformers_serve(folder: Path) -> Kind:
    """transformers' server of a model, by ``generate``."""
    return Kind(
        "transformers serve",
        "keeps nothing; computes the whole history of each request, one request after the other",
        False,
        ("-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"),
    )


def transformers_serve_batching(folder: Path, *, tokens: int) -> Kind:
    """transformers' server with continuous batching, and room for so many tokens of keys and values."""
    plain = transformers_serve(folder)
    sizes = ("--cb-block-size", BLOCK, "--cb-num-blocks", tokens // BLOCK, "--cb-max-batch-tokens", BATCH)
    return Kind(
        "transformers serve --continuous-batching",
        f"keeps keys and values of whole blocks of {BLOCK} tokens, with room for all; computes the rest, of all "
        f"requests together, {BATCH} tokens at a time",
        True,
        (*plain.options, "--continuous-batching", *map(str, sizes)),
    )


class Server:
    """A server that runs; a context manager.

    Args:
        kind: of it.
        threads: that it computes with.
        log: file for what it prints.
    """

    def __init__(self, kind: Kind, threads: int, log: Path) -> None:
        self.kind, self._log = kind, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *kind.options, "--port", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment,
                # Ctrl-C is for this process, which then ends it.
                start_new_session=True,
            )
        self._usage = psutil.Process(self._process.pid)

    def __enter__(self) -> "Server":
        return self

    def wait(self) -> None:
        """Wait until it is ready; raises ServerFailed if it does not get so."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise ServerFailed(
                    f"{self.kind.name}: ended with status {self._process.returncode}: {self._last_line()}"
                )
            with suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(0.2)
        raise ServerFailed(f"{self.kind.name}: was not ready after {START_SECONDS} seconds: {self._last_line()}")

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    @property
    def cpu_seconds(self) -> float:
        """CPU time that it has taken; 0 once it has ended."""
        if self._process.poll() is not None:
            return 0.0
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def client(self) -> httpx.AsyncClient:
        """A client, for any number of requests at a time."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(base_url=self.url, timeout=None, limits=limits, trust_env=False)

    def resident_bytes(self) -> int:
        """Its resident memory."""
        return int(self._usage.memory_info().rss)

    def _last_line(self) -> str:
        return ([*filter(str.strip, self._log.read_text(errors="replace").splitlines())] or ["nothing printed"])[-1]


class OtherWork:
    """What other processes do meanwhile."""

    def __init__(self) -> None:
        self._seconds = self._core_seconds = 0.0

    @property
    def percent(self) -> float:
        """Their CPU time, in percent of all cores."""
        return 100 * max(0.0, self._seconds) / self._core_seconds if self._core_seconds else 0.0

    @contextmanager
    def counted(self, servers: Sequence[Server]) -> Iterator[None]:
        """Count it from here on, besides that of this process and of these servers."""
        begin, others = time.monotonic(), _cpu_seconds_of_others(servers)
        yield
        self._seconds += _cpu_seconds_of_others(servers) - others
        self._core_seconds += (time.monotonic() - begin) * (os.cpu_count() or 1)


def _cpu_seconds_of_others(servers: Sequence[Server]) -> float:
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    # User and system include guests and interrupts.
    total = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return float(total - own.user - own.system - sum(server.cpu_seconds for server in servers))
