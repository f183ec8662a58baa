"""Live progress of the demonstration on stderr."""

from __future__ import annotations

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from sinkattn.recorder import Recorder
from sinkattn.report import size_text


class DemoProgress:
    """One line for each method: tokens, tokens per second, resident memory, running loss."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        console = Console(stderr=True)
        if not console.is_terminal:
            console = Console(stderr=True, width=120)
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:>9,.0f} / {task.total:,.0f} tokens"),
            TextColumn("{task.fields[speed]:>12}  {task.fields[memory]:>9}  loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> DemoProgress:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop drawing."""
        self._progress.stop()

    def resident(self) -> int:
        """Resident memory of this process in bytes."""
        return self._process.memory_info().rss

    def watch(self, name: str, recorder: Recorder, tokens: int) -> None:
        """Show where a method is (see `sinkattn.demo.Watch`)."""
        done = recorder.end
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=tokens, speed="", memory="", loss=0.0)
        task = self._progress.tasks[self._tasks[name]]
        speed = recorder.recorded / task.elapsed if task.elapsed else 0.0
        self._progress.update(
            task.id,
            completed=done,
            speed=f"{speed:,.0f} tokens/s",
            memory=size_text(self.resident()),
            loss=recorder.running_loss,
        )
