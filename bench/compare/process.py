"""A peer's process, seen from here."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
from peers import Peer

HERE = Path(__file__).parent


class PeerFailed(Exception):
    """A peer cannot be measured; the message is one line."""


class PeerProcess:
    """A running script of a peer, with its model loaded.

    Args:
        python: interpreter of its environment.
        peer: the peer.
        job: see `runner`.
        log: file for what it prints.

    Raises:
        PeerFailed: if it does not get ready.
    """

    def __init__(self, python: Path, peer: Peer, job: dict[str, Any], log: Path) -> None:
        self._log = log
        # What is added to this environment's path is none of another's.
        hidden = {"PYTHONPATH"} if peer.requirements else set()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, HERE / peer.script],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={name: value for name, value in os.environ.items() if name not in hidden},
                # Ctrl-C is for this process, which then asks for no more.
                start_new_session=True,
            )
        self._usage = psutil.Process(self._process.pid)
        self.versions: dict[str, str] = self.ask(job)["versions"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer to a request. Raises PeerFailed if that is an error, or none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            lines = self._log.read_text().strip().splitlines() or ["nothing printed"]
            raise PeerFailed(f"ended with status {self._process.wait()}: {lines[-1]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def cpu_seconds(self) -> float:
        """CPU time that it has taken."""
        times = self._usage.cpu_times()
        return float(times.user + times.system)

    def resident_bytes(self) -> int:
        """Its resident memory."""
        return int(self._usage.memory_info().rss)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
