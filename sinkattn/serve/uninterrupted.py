"""`uninterrupted`: what is done as a whole, also when the request that wants it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``. If this is cancelled, it waits until the work has ended all the same.

    For what a thread changes: a thread goes on when who waits for it is cancelled.
    """
    task, cancellation = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:  # again and again, in a task group of anyio
            cancellation = error
    if cancellation is not None:
        raise cancellation
    return task.result()
