"""Replicas of a server by Ray Serve; needs the extra ``ray``.

``run(application(make_server, ...))``, or ``sinkattn serve MODEL --sessions DIR --replicas N``.

* Each replica is a whole server with a model of its own. All share the folder of sessions, on a file system with locks
  that all machines see: a session is at one replica at a time (`Claims`).
* **Clients send the id of their session in the header X-Session-ID, with every request**, also for websockets. Ray
  hashes it to a replica, always to the same one. A client of ``/v1/responses`` sends any text that stays the same.
* Without the header a request goes to any replica. It is answered all the same, but a session that its body, its path
  or its ``previous_response_id`` names is saved and loaded whenever it moves, and a chat without a name is fed anew
  from the history of the request.
* When a replica leaves, it ends its requests and saves its sessions, and others load them; it has `SHUTDOWN_SECONDS`
  for that. When one comes, a part of the sessions are hashed to it, and handed over when they are asked for. After one
  was killed, sessions go on from where they were saved; who appends to one that had more turns gets ``turns_lost``.
* Replicas come and go so that `TARGET` of their rows are in use, as each request at work uses a row.
* The limits of a server, its figures and its list of live sessions are of one replica each. Keys protect the API; Ray's
  own ports must not be open to others.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

if TYPE_CHECKING:
    from fastapi import FastAPI

    from sinkattn.serve.server import Server

NAME = "sinkattn"
# It hashes the header that RAY_SERVE_SESSION_ID_HEADER_KEY names; by default x-session-id.
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
# The part of the rows that is in use when no replica comes or goes.
TARGET = 0.7
# A GPU's rows and host memory are saved in one or two minutes; after this Ray kills a replica that has not ended.
SHUTDOWN_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many there are, and what each takes.

    Args:
        least: that there are always.
        most: that there may be.
        num_cpus: of each, as Ray counts cores.
        num_gpus: of each.
    """

    least: int = 1
    most: int = 1
    num_cpus: float = 1
    num_gpus: float = 0


def application(
    make_server: Callable[[], Server], *, max_streams: int, requests: int, replicas: Replicas
) -> serve.Application:
    """Replicas of a server, as an application of Ray Serve.

    Args:
        make_server: called in each replica, after it was pickled; its server has a folder of sessions.
        max_streams: rows of a server.
        requests: that a server has at work or waiting at a time, as its limits say; others wait in Ray.
        replicas: how many.
    """

    def build() -> FastAPI:
        from sinkattn.serve.app import create_app

        server = make_server()
        if server.folder is None:
            raise ValueError("make_server: expected a server with a folder, which the replicas share, got None")
        return create_app(server)

    deployment = serve.deployment(
        name=NAME,
        max_ongoing_requests=requests,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.least,
            max_replicas=replicas.most,
            target_ongoing_requests=max(1.0, TARGET * max_streams),
        ),
        # A busy replica is waited for, as its sessions are there.
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 0}
        ),
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
    )
    return deployment(serve.ingress(build)()).bind()


def run(app: serve.Application, host: str, port: int) -> None:
    """Serve an application until the process is asked to end, on all machines of its Ray cluster if it is in one."""
    serve.start(http_options={"host": host, "port": port})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # instead of the handler that Ray has just set
    try:
        serve.run(app, name=NAME, route_prefix="/")
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        end()


def end() -> None:
    """End the replicas, which save their sessions."""
    # `serve.shutdown` would wait for half a minute only.
    while NAME in serve.status().applications:
        with contextlib.suppress(TimeoutError):
            serve.delete(NAME)
    serve.shutdown()
