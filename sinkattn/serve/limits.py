"""`Limits`: what clients of a server may use."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients of a server may use.

    Args:
        body_bytes: of a request.
        max_tokens: of a reply.
        sessions_per_key: streams that a key has at a time, those without a name among them.
        requests: at work or waiting at a time, of all keys.
        idle_seconds: after which a session that nobody has used is closed.
    """

    body_bytes: int = 4 << 20
    max_tokens: int = 4096
    sessions_per_key: int = 64
    requests: int = 256
    idle_seconds: float = 3600.0
