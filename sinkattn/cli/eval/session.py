"""One run of a command of ``sinkattn eval``: its model, its default sizes, its text, its progress and its output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import check_writable, describe_model, load_model, model_lines, open_text
from sinkattn.cli.errors import UserError, as_user_error, require
from sinkattn.cli.formatting import console

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from sinkattn.cli.progress import Bar
    from sinkattn.evaluate.exact_match import Tally
    from sinkattn.evaluate.methods import CacheSize, Predictor
    from sinkattn.evaluate.speed import Speed
    from sinkattn.evaluate.text import Text, TokenStream


class Session:
    """Model, tokenizer, progress and output of one evaluation."""

    def __init__(self, args: argparse.Namespace) -> None:
        from sinkattn.cli.progress import StreamProgress

        self.args = args
        self.model, self.tokenizer = load_model(args)
        self.facts = describe_model(self.model, args)
        self.progress = StreamProgress()
        self.interrupted = Event()
        print(model_lines(self.facts), flush=True)

    @cached_property
    def speed(self) -> Speed:
        """How fast the model is here."""
        from sinkattn.evaluate.speed import measure_speed

        return measure_speed(self.model)

    @property
    def total(self) -> int:
        """Default total of sinks and window: half of the model's maximum, at most 1024."""
        return max(16, self._max_total(2048) // 2)

    def sizes(self, num_sinks: int) -> list[int]:
        """Default totals to compare, each twice the one before, up to the model's maximum or 4096."""
        largest = self._max_total(4096)
        return [largest // 2**power for power in range(4, -1, -1) if largest // 2**power > num_sinks] or [largest]

    def _max_total(self, limit: int) -> int:
        from sinkattn.hf.model_config import default_window

        return default_window(self.model, 0, limit)

    def caches(self, sink_counts: tuple[int, ...]) -> tuple[CacheSize, ...]:
        """The cache sizes that were given; by default one of the default total for each of ``sink_counts``."""
        from sinkattn.evaluate.methods import CacheSize

        if self.args.cache:
            return tuple(dict.fromkeys(map(CacheSize.parse, self.args.cache)))
        return tuple(CacheSize(sinks, self.total - sinks) for sinks in sink_counts)

    def stream(self) -> TokenStream:
        """Open the text that was given, and print its description."""
        from sinkattn.evaluate.text import HubDataset, TokenStream

        args = self.args
        text: Text
        if args.dataset:
            require("datasets", "datasets")
            text = HubDataset(args.dataset, args.split or "test", args.column or "text")
        elif args.split or args.column:
            raise UserError("split, column: these are of a data set; give --dataset NAME")
        else:
            text = open_text(args.text)
        print(f"Text: {text.description}", flush=True)
        return TokenStream(text, self.tokenizer, not args.no_start_token)

    def show_accuracies(self, predictors: Sequence[Predictor], bar: Bar) -> Callable[[int, int, list[Tally]], None]:
        """A callback for `exact_match.run` that shows the accuracies so far on a progress bar."""

        def on_progress(done: int, tokens: int, tallies: list[Tally]) -> None:
            pairs = zip(predictors, tallies, strict=True)
            bar(done, "  ".join(f"{predictor.name} {tally.accuracy:.0%}" for predictor, tally in pairs))

        return on_progress

    def report(self, results: dict[str, Any]) -> dict[str, Any]:
        """What is written as JSON: evaluation, whether it was interrupted, model, versions, machine, ``results``."""
        from sinkattn.evaluate.environment import machine, versions

        return {
            "evaluation": self.args.evaluation,
            "interrupted": self.interrupted.is_set(),
            "model": self.facts,
            "versions": versions(),
            "machine": machine(),
            **results,
        }

    def finish(
        self, results: dict[str, Any], table: RenderableType, draw: Callable[[Figure, dict[str, Any]], None]
    ) -> None:
        """Print the table, and write the report and the picture that were asked for.

        Args:
            results: the part of the report that the command adds.
            table: the results as a table, or several.
            draw: draws the whole report.
        """
        console().print(table)
        if self.interrupted.is_set():
            print("Interrupted: these are the figures until then.")
        report = self.report(results)
        if self.args.json:
            write_json(self.args.json, report)
            print(f"Figures: {self.args.json}")
        if self.args.plot:
            figure = require("matplotlib.figure").Figure(layout="constrained")
            draw(figure, report)
            text = f", {report['text']['description']}" if "text" in report else ""
            figure.suptitle(f"{self.args.prog}: {report['model']['name']}{text}", fontsize=10)
            figure.savefig(self.args.plot, dpi=150)
            print(f"Picture: {self.args.plot}")


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a report. Who reads a file while it is rewritten sees the old or the new report, never a part of one."""
    text = json.dumps(report, indent=2) + "\n"
    if path.exists() and not path.is_file():
        path.write_text(text)  # a device or a pipe
        return
    path = path.resolve()  # the file that a link names, not the link
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


@contextmanager
def open_session(args: argparse.Namespace, *outputs: Path | None) -> Iterator[Session]:
    """Check the output files (``outputs`` are those beyond JSON and picture), then load the model.

    Errors that the user can correct become `UserError` within the context. After a first Ctrl-C within it, measurements
    end with what they have, and the context raises KeyboardInterrupt when all is written; a second one interrupts at
    once.
    """
    for name in ("matplotlib.figure", "psutil", "rich", "scipy"):
        require(name)
    from sinkattn.cli.pictures import check_format

    check_writable(args.json, args.plot, *outputs)
    with as_user_error(ValueError, RuntimeError, OSError):
        if args.plot:
            check_format(args.plot)
        session = Session(args)
        from sinkattn.evaluate.interruption import interruptible

        with interruptible(session.model) as session.interrupted:
            yield session
    if session.interrupted.is_set():
        raise KeyboardInterrupt
