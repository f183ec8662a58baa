"""Progress on stderr: bars on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from threading import Event, Thread
from typing import Protocol

import psutil
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn

from sinkattn.cli.formatting import console, duration_text, size_text

LINE_SECONDS = 60.0


class Bar(Protocol):
    """Updates a progress bar."""

    def __call__(self, done: int, note: str = "") -> None:
        """Set how much is done, and the note at the end of the bar."""


class StreamProgress:
    """A progress bar for each part of the work, with speed, resident memory and a note.

    Where stderr is no terminal, a line every minute tells about the part that is running; the bars come at the end.
    """

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
        self._ended = Event()
        self._lines = Thread(target=self._print_lines, daemon=True)
        self._current: Task | None = None

    def __enter__(self) -> StreamProgress:
        """Start drawing."""
        self._progress.start()
        if not self._progress.console.is_terminal:
            self._lines.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing."""
        self._ended.set()
        if self._lines.is_alive():
            self._lines.join()
        self._progress.stop()

    def _print_lines(self) -> None:
        began = time.monotonic()
        while not self._ended.wait(LINE_SECONDS):
            print(f"after {duration_text(time.monotonic() - began)}: {self._line()}", file=sys.stderr, flush=True)

    def _line(self) -> str:
        if (task := self._current) is None:
            return "nothing done yet"
        line = f"{task.description}: {task.completed:,.0f} of {task.total:,.0f}"
        if task.completed and task.total and task.elapsed:
            line += f", about {duration_text(task.elapsed * (task.total / task.completed - 1))} left of it"
        return f"{line}  {task.fields['note']}".rstrip()

    def resident(self) -> int:
        """Resident memory of this process in bytes."""
        return self._process.memory_info().rss

    def add(self, name: str, total: int) -> Bar:
        """Add a bar for ``total`` units of work."""
        number = self._progress.add_task(name, total=total, speed="", memory="", note="")
        self._current = task = next(task for task in self._progress.tasks if task.id == number)

        def update(done: int, note: str = "") -> None:
            self._current = task
            speed = done / task.elapsed if task.elapsed else 0.0
            self._progress.update(
                number, completed=done, speed=f"{speed:,.0f}", memory=size_text(self.resident()), note=note
            )

        return update
