"""`CatchingUp`: what replies end with runs while nobody waits for it."""

from __future__ import annotations

import asyncio
import logging

from sinkattn.hf.pool.stream import Stream

LOGGER = logging.getLogger("sinkattn.serve")


class CatchingUp:
    """Streams that run what a reply has ended with, so that the next request has less to wait for.

    A stream can be used meanwhile as at any other time.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        """Or nothing would refer to them."""

    def begin(self, stream: Stream) -> None:
        """Begin with a stream, without waiting."""
        task = asyncio.create_task(_catch_up(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _catch_up(stream: Stream) -> None:
    try:
        await asyncio.to_thread(stream.catch_up)
    except Exception:
        # The tokens wait on, and whoever uses the stream next runs them, or gets the error.
        LOGGER.exception("the end of a reply has not run yet")
