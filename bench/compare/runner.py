"""What a peer's script does with its input and output; runs in the environment of every peer.

A script reads one JSON object per line and answers each with one line:

* the job: ``model`` (path), ``ids`` (prompt, then the text to score), ``prompt`` (its length), ``sinks``, ``cache``
  (tokens in sight), ``threads``, ``dtype``, ``kv_elements`` (of one token in all layers), ``options`` (of the peer).
  Answer: ``versions``.
* ``{"time": tokens, "seconds": limit}``: generate greedily. Answer: ``ms``, one figure per token, and ``kv_bytes``.
* ``{"score": tokens}``: predict the text behind the prompt. Answer: ``losses`` in nats and ``likeliest``, the id with
  the highest logit, for each token; null where the peer made no prediction.

An exception is answered with ``error``, and ends the script.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Protocol

# Generated before the tokens that are timed, in every turn: the weights of other peers are in the processor's caches.
WARM_UP = 8


class Runner(Protocol):
    """One peer, with its model loaded."""

    packages: tuple[str, ...]
    """Distributions whose versions are reported."""

    def time(self, tokens: int, seconds: float) -> list[float]:
        """Generate `WARM_UP` tokens, then up to ``tokens`` within ``seconds``; milliseconds of each of the latter."""

    def kv_bytes(self) -> int | None:
        """Bytes of the keys and values; None without a cache."""

    def score(self, tokens: int) -> tuple[list[float | None], list[int | None]]:
        """Losses and likeliest ids of the ``tokens`` tokens behind the prompt, on a new stream."""


def serve(create: Callable[[dict[str, Any]], Runner]) -> None:
    """Answer the lines on stdin."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runner = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if runner is None:
                runner = create(request)
                answer = {"versions": {name: version(name) for name in runner.packages}}
            elif "time" in request:
                ms = runner.time(request["time"], request["seconds"])
                answer = {"ms": ms, "kv_bytes": runner.kv_bytes()}
            else:
                losses, likeliest = runner.score(request["score"])
                answer = {"losses": losses, "likeliest": likeliest}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            print(json.dumps({"error": f"{type(error).__name__}: {lines[0]}"}), file=answers, flush=True)
            raise
        print(json.dumps(answer), file=answers, flush=True)


def time_steps(step: Callable[[int], int], token: int, tokens: int, seconds: float) -> tuple[list[float], int]:
    """Call ``step``, from a token to the next, up to ``tokens`` times; milliseconds of each, and the last token."""
    for _ in range(WARM_UP):
        token = step(token)
    ms: list[float] = []
    end = time.perf_counter() + seconds
    while len(ms) < tokens and (start := time.perf_counter()) < end:
        token = step(token)
        ms.append((time.perf_counter() - start) * 1e3)
    return ms, token
