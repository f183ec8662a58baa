"""Progress bars on stderr."""

from __future__ import annotations

from typing import Protocol

import psutil
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sinkattn.cli.formatting import console, size_text


class Bar(Protocol):
    """Updates a progress bar."""

    def __call__(self, done: int, note: str = "") -> None:
        """Set how much is done, and the note at the end of the bar."""


class StreamProgress:
    """Progress bars, one for each part of the work, with speed, resident memory and a note."""

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

    def add(self, name: str, total: int) -> Bar:
        """Add a bar for ``total`` units of work."""
        number = self._progress.add_task(name, total=total, speed="", memory="", note="")
        task = next(task for task in self._progress.tasks if task.id == number)

        def update(done: int, note: str = "") -> None:
            speed = done / task.elapsed if task.elapsed else 0.0
            self._progress.update(
                number, completed=done, speed=f"{speed:,.0f}", memory=size_text(self.resident()), note=note
            )

        return update
