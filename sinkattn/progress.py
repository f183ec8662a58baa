"""Live progress of long work on stderr."""

from __future__ import annotations

from collections.abc import Callable

import psutil
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sinkattn.report import console, size_text


class StreamProgress:
    """Bars, one for each part of the work, with tokens or whatever they count, its speed and the resident memory."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._progress = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:>9,.0f} / {task.total:,.0f}"),
            TextColumn("{task.fields[speed]:>9}/s  {task.fields[memory]:>9}  {task.fields[note]}"),
            TimeElapsedColumn(),
            console=console(stderr=True),
            refresh_per_second=4,
        )

    def __enter__(self) -> StreamProgress:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing."""
        self._progress.stop()

    def resident(self) -> int:
        """Resident memory of this process in bytes."""
        return self._process.memory_info().rss

    def add(self, name: str, total: int) -> Callable[..., None]:
        """A new bar; call it with what is done, and a note."""
        number = self._progress.add_task(name, total=total, speed="", memory="", note="")
        task = next(task for task in self._progress.tasks if task.id == number)

        def update(done: int, note: str = "") -> None:
            speed = done / task.elapsed if task.elapsed else 0.0
            self._progress.update(
                number, completed=done, speed=f"{speed:,.0f}", memory=size_text(self.resident()), note=note
            )

        return update
