"""Sessions on replicas, simulated: where their streams are when they are needed, and how long that takes.

A session comes at random, has some turns with pauses between them, and stays, as a server cannot know that it is over,
unless its client deletes it. In each turn it needs a row of a replica for as long as its message is fed and the reply
generated. Its stream stays in the row until another session needs it; then the one that has been idle for longest is
parked in host memory, and from there, when that is full, saved in a folder that all replicas share. When a replica
leaves, its streams are saved.

A turn of a session goes to the replica that has its stream in a row or parked, else to the one that its id is hashed to
(``--route session``); or to any replica (``--route any``), and the stream is saved first where it is. While all rows
are at work, turns wait for the next free one, in order. Streams move over two channels of each replica, to the host
and to the folder, one after another, and a turn begins when its own has come.

``python bench/simulate_sessions.py`` prints the table of docs/scale.md; with ``--sessions 20000`` it takes seconds.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np
import scale

NEW, ROW, PARKED, SAVED, DELETED = range(5)
PLACES = ("new", "row", "host", "folder")
# Counted is from the time on when this part of the sessions has come, until the last one has.
WARM_UP = 0.2


@dataclass(frozen=True, kw_only=True)
class Load:
    """What clients do.

    Args:
        sessions: how many.
        rate: of them a second, at random.
        turns: of a session, mean (geometric distribution).
        pause: seconds between a reply and the next message, mean (exponential distribution).
        message: tokens, mean (geometric distribution).
        reply: tokens, mean (geometric distribution).
        deletes: whether clients delete their sessions at the end.
    """

    sessions: int
    rate: float
    turns: float = 4.0
    pause: float = 60.0
    message: float = 50.0
    reply: float = 200.0
    deletes: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What serves them.

    Args:
        replicas: how many.
        rows: of each.
        parked: streams in its host memory.
        first_seconds: of a turn before its first token, besides `feed_seconds`.
        feed_seconds: of a token that is fed.
        token_seconds: of a token that is generated; as if all rows were always at work.
        host_seconds: of a stream between a row and host memory.
        folder_seconds: of a stream to the folder, or back.
        leaving: a replica that leaves, and after which part of the sessions has come; None for none.
        route: to the replica of the session, or to any.
    """

    replicas: int
    rows: int
    parked: int
    first_seconds: float = 0.0
    feed_seconds: float
    token_seconds: float
    host_seconds: float
    folder_seconds: float
    leaving: tuple[int, float] | None = None
    route: Literal["session", "any"] = "session"


@dataclass(frozen=True)
class Result:
    """What came of it; of turns after the warm-up."""

    turns: int
    places: dict[str, float]
    """Share of the turns by where their stream was: new, in a row, in host memory, in the folder."""
    waits: np.ndarray
    """Seconds of each turn until a row was free."""
    first_tokens: np.ndarray
    """Seconds of each turn until the first token."""
    num_left: int
    """Streams that a replica had when it left."""
    at_work: float
    """Share of the rows that are at work."""
    host_busy: float
    """Share of the time in which streams move between rows and host memory, of a replica."""
    folder_busy: float
    """The same for the folder."""
    held: int
    """Streams in rows, in host memory and in the folder at the end."""
    most_rows: int
    """The most rows of a replica that were taken at a time."""
    most_parked: int


class Replica:
    """Rows, host memory and channels of a replica."""

    def __init__(self, index: int, cluster: Cluster, counted: tuple[float, float]) -> None:
        self.index, self._cluster, self._counted = index, cluster, counted
        self.num_at_work = 0
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Sessions in rows of which nothing is wanted, the longest idle first."""
        self.parked: OrderedDict[int, None] = OrderedDict()
        self.waiting: deque[int] = deque()
        self.host_free = self.folder_free = self.host_total = self.folder_total = 0.0

    def over_host(self, now: float) -> float:
        """When a stream has moved between a row and host memory."""
        self.host_free = max(now, self.host_free) + self._cluster.host_seconds
        if self._counted[0] <= now < self._counted[1]:
            self.host_total += self._cluster.host_seconds
        return self.host_free

    def over_folder(self, now: float) -> float:
        """When a stream has moved to the folder or back."""
        self.folder_free = max(now, self.folder_free) + self._cluster.folder_seconds
        if self._counted[0] <= now < self._counted[1]:
            self.folder_total += self._cluster.folder_seconds
        return self.folder_free


class Simulation:
    """One run."""

    def __init__(self, load: Load, cluster: Cluster, seed: int = 0) -> None:
        self._load, self._cluster = load, cluster
        random = np.random.default_rng(seed)
        count = load.sessions
        self._arrivals = np.cumsum(random.exponential(1 / load.rate, count)).tolist()
        turns = random.geometric(1 / load.turns, count)
        self._next_turn = (np.cumsum(turns) - turns).tolist()
        self._last_turn = np.cumsum(turns).tolist()
        total = int(turns.sum())
        self._pauses = array("d", random.exponential(load.pause, total).tobytes())
        self._fed = array("l", random.geometric(1 / load.message, total).tobytes())
        self._replies = array("l", random.geometric(1 / load.reply, total).tobytes())
        # A session's replica is that of the highest score among those that are there: if one leaves, only its own move.
        scores = random.random((count, cluster.replicas), dtype=np.float32)
        self._home = scores.argmax(axis=1).tolist()
        if cluster.leaving is not None and cluster.replicas > 1:
            scores[:, cluster.leaving[0]] = -1
        self._home_after = scores.argmax(axis=1).tolist()
        self._any = random.integers(0, cluster.replicas, total).tolist() if cluster.route == "any" else []
        self._place = bytearray(count)
        self._at = [-1] * count
        """Replica that has a stream in a row or parked."""
        self._since = [0.0] * count
        """When a turn that waits has come."""
        self._counted = self._arrivals[int(WARM_UP * count)], self._arrivals[-1]
        self._replicas = [Replica(index, cluster, self._counted) for index in range(cluster.replicas)]
        self._gone = -1
        self._ends: list[tuple[float, int]] = []
        self._places: Counter[int] = Counter()
        self._waits, self._firsts = array("d"), array("d")
        self._busy, self._most_rows, self._most_parked, self._num_left = 0.0, 0, 0, 0

    def run(self) -> Result:
        """Run it."""
        arrivals, later, ends, index, count = self._arrivals, list[tuple[float, int]](), self._ends, 0, len(self._at)
        leaving = float("inf")
        if self._cluster.leaving is not None:
            leaving = arrivals[int(self._cluster.leaving[1] * count)]
        never = (float("inf"), -1)
        while index < count or later or ends:
            arrival = arrivals[index] if index < count else float("inf")
            turn, end = later[0] if later else never, ends[0] if ends else never
            now = min(arrival, turn[0], end[0])
            if now >= leaving:
                self._leave(leaving)
                leaving = float("inf")
            elif end[0] <= now:
                heappop(ends)
                session = end[1]
                self._end(now, session)
                done = self._next_turn[session]
                if done < self._last_turn[session]:
                    heappush(later, (now + self._pauses[done], session))
            elif turn[0] <= now:
                heappop(later)
                self._since[turn[1]] = now
                self._come(now, turn[1])
            else:
                self._since[index] = now
                self._come(now, index)
                index += 1
        return self._result()

    def _come(self, now: float, session: int) -> None:
        """A turn of a session comes, or is sent to another replica."""
        place, at = self._place[session], self._at[session]
        if self._cluster.route == "any":
            replica = self._any[self._next_turn[session]]
            if place in (ROW, PARKED) and at != replica:
                self._save(now, session)
        elif place in (ROW, PARKED):
            replica = at
        else:
            replica = (self._home if self._gone < 0 else self._home_after)[session]
        chosen = self._replicas[replica]
        if chosen.num_at_work < self._cluster.rows:
            self._start(now, session, chosen)
        else:
            chosen.waiting.append(session)

    def _start(self, now: float, session: int, replica: Replica) -> None:
        """A turn gets a row."""
        place, cluster = self._place[session], self._cluster
        ready = now
        if place == ROW:
            del replica.idle[session]
        else:
            if place == PARKED:
                del replica.parked[session]
            if replica.num_at_work + len(replica.idle) == cluster.rows:
                ready = self._park(now, replica)
            if place == SAVED:
                ready = max(ready, replica.over_folder(now))
            if place != NEW:
                ready = replica.over_host(ready)
        self._place[session], self._at[session] = ROW, replica.index
        replica.num_at_work += 1
        self._most_rows = max(self._most_rows, replica.num_at_work + len(replica.idle))
        turn = self._next_turn[session]
        self._next_turn[session] = turn + 1
        first = ready + cluster.first_seconds + cluster.feed_seconds * self._fed[turn]
        end = first + cluster.token_seconds * self._replies[turn]
        heappush(self._ends, (end, session))
        came = self._since[session]
        begin, until = self._counted
        self._busy += max(0.0, min(end, until) - max(now, begin))
        if begin <= came < until:
            self._places[place] += 1
            self._waits.append(now - came)
            self._firsts.append(first + cluster.token_seconds - came)

    def _park(self, now: float, replica: Replica) -> float:
        """Free the row of the session that has been idle for longest; returns when it is free."""
        session, _ = replica.idle.popitem(last=False)
        if not self._cluster.parked:
            self._place[session], self._at[session] = SAVED, -1
            return replica.over_folder(replica.over_host(now))
        if len(replica.parked) == self._cluster.parked:
            oldest, _ = replica.parked.popitem(last=False)
            self._place[oldest], self._at[oldest] = SAVED, -1
            replica.over_folder(now)
        self._place[session] = PARKED
        replica.parked[session] = None
        self._most_parked = max(self._most_parked, len(replica.parked))
        return replica.over_host(now)

    def _save(self, now: float, session: int) -> None:
        """Save a stream of which nothing is wanted, and give up its memory."""
        replica = self._replicas[self._at[session]]
        if self._place[session] == ROW:
            del replica.idle[session]
            replica.over_folder(replica.over_host(now))
        else:
            del replica.parked[session]
            replica.over_folder(now)
        self._place[session], self._at[session] = SAVED, -1

    def _end(self, now: float, session: int) -> None:
        """A turn ends."""
        at = self._at[session]
        replica = self._replicas[at]
        replica.num_at_work -= 1
        if self._load.deletes and self._next_turn[session] == self._last_turn[session]:
            self._place[session] = DELETED
        else:
            replica.idle[session] = None
            if at == self._gone:
                self._save(now, session)
        if replica.waiting:
            self._start(now, replica.waiting.popleft(), replica)

    def _leave(self, now: float) -> None:
        """A replica takes no more turns, ends those that are at work, and saves its streams."""
        assert self._cluster.leaving is not None
        self._gone, _ = self._cluster.leaving
        replica = self._replicas[self._gone]
        self._num_left = replica.num_at_work + len(replica.idle) + len(replica.parked)
        waiting, replica.waiting = replica.waiting, deque()
        for session in [*replica.idle, *replica.parked]:
            self._save(now, session)
        for session in waiting:
            self._come(now, session)

    def _result(self) -> Result:
        cluster, turns = self._cluster, len(self._waits)
        seconds = cluster.replicas * (self._counted[1] - self._counted[0])
        return Result(
            turns,
            {PLACES[x]: self._places[x] / turns for x in range(4)},
            np.frombuffer(self._waits),
            np.frombuffer(self._firsts),
            self._num_left,
            self._busy / (cluster.rows * seconds),
            sum(x.host_total for x in self._replicas) / seconds,
            sum(x.folder_total for x in self._replicas) / seconds,
            len(self._place) - self._place.count(NEW) - self._place.count(DELETED),
            self._most_rows,
            self._most_parked,
        )


# The cases of docs/scale.md: Llama 3.1 8B on eight H200.
REPLICAS, SHAPE, GPU = 8, scale.MODELS[1], scale.H200
# Assumed: bytes a second between a GPU and host memory (PCIe 5 with 16 lanes: 64 GB/s in theory), between a replica and
# the folder (a fast SSD, or 40 Gbit/s), and host memory for parked streams.
HOST_GBS, FOLDER_GBS, HOST_GB = 50.0, 5.0, 256
# Measured on an H200: 4,096 tokens are fed in 116 ms.
FEED_SECONDS = 0.116 / 4096


@dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Args:
        window: of the streams.
        pause: seconds between the turns of a session, mean.
        deletes: whether clients delete their sessions at the end.
        at_work: share of the rows that would be at work if moving streams took no time.
        changes: of the cluster.
    """

    window: int = 1024
    pause: float = 10.0
    deletes: bool = False
    at_work: float = 0.6
    changes: dict[str, Any] = field(default_factory=dict)

    def cluster(self) -> Cluster:
        """Replicas with as many rows as fit."""
        stream = SHAPE.stream(self.window)
        rows = scale.num_streams(SHAPE, GPU, self.window)
        step = scale.step_ms(SHAPE, GPU, rows, self.window) / 1000
        cluster = Cluster(
            replicas=REPLICAS,
            rows=rows,
            parked=HOST_GB * scale.GB // stream,
            feed_seconds=FEED_SECONDS,
            token_seconds=step,
            host_seconds=stream / HOST_GBS / scale.GB,
            folder_seconds=stream / FOLDER_GBS / scale.GB,
        )
        return replace(cluster, **self.changes)

    def load(self, sessions: int) -> Load:
        """As many sessions a second as this takes."""
        cluster, load = self.cluster(), Load(sessions=sessions, rate=1.0, pause=self.pause, deletes=self.deletes)
        turn = cluster.feed_seconds * load.message + cluster.token_seconds * load.reply
        return replace(load, rate=self.at_work * cluster.rows * cluster.replicas / (turn * load.turns))


CASES = {
    "W = 1k": Case(),
    "W = 1k, sessions are deleted": Case(deletes=True),
    "W = 1k, any replica": Case(changes={"route": "any"}),
    "W = 1k, nothing parked": Case(changes={"parked": 0}),
    "W = 1k, pauses of 60 s": Case(pause=60),
    "W = 1k, pauses of 60 s, few turns": Case(pause=60, at_work=0.15),
    "the same, sessions are deleted": Case(pause=60, at_work=0.15, deletes=True),
    "twice as many turns": Case(pause=60, at_work=0.3, deletes=True),
    "W = 1k, fewer turns": Case(at_work=0.5),
    "the same, a replica leaves": Case(at_work=0.5, changes={"leaving": (0, 0.6)}),
    "W = 4k": Case(window=4096),
    "W = 16k": Case(window=16384),
    "W = 16k, fewer turns": Case(window=16384, at_work=0.4),
}
HEAD = (
    "| | rows + parked | turns/s | % in a row | % in host memory | % in the folder | first token, ms | 99 %, ms | "
    "% rows at work | % host busy | % folder busy |"
)


def row(name: str, case: Case, sessions: int, seed: int) -> str:
    """A row of the table."""
    load, cluster = case.load(sessions), case.cluster()
    result = Simulation(load, cluster, seed).run()
    shares = " | ".join(f"{100 * result.places[x]:.1f}" for x in ("row", "host", "folder"))
    times = " | ".join(f"{1000 * np.quantile(result.first_tokens, x):,.0f}" for x in (0.5, 0.99))
    if result.at_work > 0.99:
        times = "grow | grow"  # more than the replicas can do, so it depends on how long this goes on
    busy = " | ".join(f"{100 * x:.1f}" for x in (result.at_work, result.host_busy, result.folder_busy))
    return (
        f"| {name} | {cluster.rows} + {cluster.parked:,} | {load.rate * load.turns:.0f} | {shares} | {times} | {busy} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(HEAD)
    print("|---" * HEAD.count(" |") + "|")
    begin = time.process_time()
    for name, case in CASES.items():
        print(row(name, case, args.sessions, args.seed), flush=True)
    print(f"\n{(time.process_time() - begin) / len(CASES):.0f} s of CPU time each")


if __name__ == "__main__":
    main()
