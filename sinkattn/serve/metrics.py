"""`Metrics`: figures of a server in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Figures of a server.

    Args:
        gauges: what is read when somebody asks, by name, and what it is.
    """

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("sinkattn_requests", "Requests", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("sinkattn_prompt_tokens", "Tokens of prompts that were fed", registry=registry)
        self.reused_tokens = Counter("sinkattn_reused_tokens", "Tokens in sight before a request", registry=registry)
        self.tokens = Counter("sinkattn_generated_tokens", "Tokens that were generated", registry=registry)
        self.evicted_tokens = Counter("sinkattn_evicted_tokens", "Tokens that have left a window", registry=registry)
        self.first_token = Histogram(
            "sinkattn_time_to_first_token_seconds", "Time to the first token", buckets=FIRST_TOKEN, registry=registry
        )
        for name, (text, function) in gauges.items():
            Gauge(name, text, registry=registry).set_function(function)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)


class FirstToken:
    """Observes the time from its making to the first `noted`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._begin = metrics, time.perf_counter()
        self._is_noted = False

    def note(self) -> None:
        """A token is there."""
        if not self._is_noted:
            self._is_noted = True
            self._metrics.first_token.observe(time.perf_counter() - self._begin)
