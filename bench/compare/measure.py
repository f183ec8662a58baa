"""The measurements: peers in turns, round after round, then a text that each predicts."""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from environments import EnvironmentFailed
from peers import Peer
from process import PeerFailed, PeerProcess


@dataclass
class Result:
    """What was measured of a peer.

    Attributes:
        name: name of the peer.
        bits: of a weight.
        versions: of its packages.
        ms: milliseconds of each timed token, a list for each round.
        kv_bytes: keys and values after the last round; None without a cache.
        resident_bytes: memory of its process after the last round.
        losses, likeliest: of each token of the text; None where it made no prediction.
        error: why there is nothing, or nothing more.
    """

    name: str
    bits: int
    versions: dict[str, str] = field(default_factory=dict)
    ms: list[list[float]] = field(default_factory=list)
    kv_bytes: int | None = None
    resident_bytes: int | None = None
    losses: list[float | None] = field(default_factory=list)
    likeliest: list[int | None] = field(default_factory=list)
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: turns of each peer.
        turn_tokens, turn_seconds: limits of a turn, whichever is reached first.
        text_tokens: tokens behind the prompt that are predicted.
    """

    rounds: int
    turn_tokens: int
    turn_seconds: float
    text_tokens: int


class Comparison:
    """Results of peers as they come in.

    Args:
        peers: the peers, and the bits of a weight of each.
        start: starts a peer's process; raises EnvironmentFailed or PeerFailed.
    """

    def __init__(self, peers: dict[Peer, int], start: Callable[[Peer], PeerProcess]) -> None:
        self.results = {peer: Result(peer.name, bits) for peer, bits in peers.items()}
        self._start = start
        self._running: dict[Peer, PeerProcess] = {}
        self._other_seconds = self._core_seconds = 0.0

    @property
    def other_work(self) -> float:
        """CPU time of other processes during the turns, in percent of all cores."""
        return 100 * max(0.0, self._other_seconds) / self._core_seconds if self._core_seconds else 0.0

    def run(self, plan: Plan) -> None:
        """Load all peers, time them in rounds, let them predict the text. Ctrl-C ends it; what there is stays."""
        try:
            for peer in self.results:
                self._try(peer, self._load)
            for number in range(plan.rounds):
                say(f"round {number + 1} of {plan.rounds}")
                # The order turns, so that none always runs after the same one.
                peers = list(self._running)
                first = number % max(1, len(peers))
                for peer in peers[first:] + peers[:first]:
                    self._try(peer, lambda peer: self._time(peer, plan))
            for peer in list(self._running):
                self._try(peer, lambda peer: self._score(peer, plan))
        except KeyboardInterrupt:
            say("interrupted; what was measured so far:")
        finally:
            for process in self._running.values():
                process.close()

    def _try(self, peer: Peer, what: Callable[[Peer], None]) -> None:
        try:
            what(peer)
        except (EnvironmentFailed, PeerFailed) as error:
            self.results[peer].error = str(error)
            say(f"{peer.name}: {error}")
            if peer in self._running:
                self._running.pop(peer).close()

    def _load(self, peer: Peer) -> None:
        say(f"{peer.name}: loading")
        self._running[peer] = self._start(peer)
        self.results[peer].versions = self._running[peer].versions

    def _time(self, peer: Peer, plan: Plan) -> None:
        process, result = self._running[peer], self.results[peer]
        begin, others = time.perf_counter(), _cpu_seconds() - process.cpu_seconds()
        answer = process.ask({"time": plan.turn_tokens, "seconds": plan.turn_seconds})
        self._other_seconds += _cpu_seconds() - process.cpu_seconds() - others
        self._core_seconds += (time.perf_counter() - begin) * (os.cpu_count() or 1)
        if not answer["ms"]:
            raise PeerFailed("timed no token in a turn")
        result.ms.append(answer["ms"])
        result.kv_bytes, result.resident_bytes = answer["kv_bytes"], process.resident_bytes()
        say(f"  {peer.name}: {statistics.median(answer['ms']):.1f} ms a token")

    def _score(self, peer: Peer, plan: Plan) -> None:
        say(f"text: {peer.name}")
        answer = self._running[peer].ask({"score": plan.text_tokens})
        self.results[peer].losses, self.results[peer].likeliest = answer["losses"], answer["likeliest"]
        self._running.pop(peer).close()


def say(line: str) -> None:
    """Tell how far it is."""
    print(line, file=sys.stderr, flush=True)


def _cpu_seconds() -> float:
    """CPU time of all processes since boot."""
    times = psutil.cpu_times()
    # User and system include guests and interrupts.
    return float(sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal")))
