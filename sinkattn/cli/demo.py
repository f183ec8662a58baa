"""``sinkattn demo``: arguments and running; `demo_report` and `demo_picture` show the result."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from sinkattn.cli.arguments import (
    add_command,
    add_layout,
    add_model,
    check_writable,
    describe_model,
    describe_text,
    load_model,
    model_lines,
    open_text,
    positive,
)
from sinkattn.cli.budget import SHARES, add_minutes, choose
from sinkattn.cli.errors import as_user_error, require

if TYPE_CHECKING:
    from sinkattn.cli.arguments import Commands
    from sinkattn.cli.progress import Bar
    from sinkattn.evaluate.demo import Settings
    from sinkattn.evaluate.recorder import Recorder

TOKENS = 16_000
DENSE_TOKENS = 5_000
SAMPLES = 1_000
MIN_SAMPLES = 8


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "demo", run, "compare four ways to stream a text through a model")
    add_model(parser)
    add_layout(parser, 124, "124")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, - for stdin (default: Python's standard library)")
    parser.add_argument("--tokens", type=positive, help=f"length of the stream (default: up to {TOKENS})")
    parser.add_argument(
        "--dense-tokens",
        type=positive,
        help=f"stop the dense model after this many tokens (default: up to {DENSE_TOKENS})",
    )
    parser.add_argument("--samples", type=positive, help=f"tokens scored in each part (default: up to {SAMPLES})")
    add_minutes(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing those tokens (default: %(default)s)")
    parser.add_argument(
        "--plot", type=Path, default=Path("demo.png"), metavar="FILE", help="picture to write (default: demo.png)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="JSON file to write all figures to")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    for name in ("matplotlib.figure", "psutil", "rich"):
        require(name)
    from sinkattn.cli import demo_picture, demo_report
    from sinkattn.cli.pictures import check_format
    from sinkattn.cli.progress import StreamProgress
    from sinkattn.evaluate import demo
    from sinkattn.evaluate.interruption import interruptible
    from sinkattn.evaluate.speed import measure_speed
    from sinkattn.evaluate.text import TokenStream

    candidates = [*_candidates(args)]
    check_writable(args.plot, args.json)
    with as_user_error(ValueError):
        check_format(args.plot)
        candidates[0].check()
        text = open_text(args.text)
    model, tokenizer = load_model(args)
    stream = TokenStream(text, tokenizer)
    model_facts = describe_model(model, args)
    print(model_lines(model_facts))
    print(f"Text: {text.description}", flush=True)
    with as_user_error(ValueError, RuntimeError, OSError), interruptible(model) as interrupted:
        speed = measure_speed(model)
        settings = choose(candidates, lambda each: each.seconds(speed), args.minutes)
        bars: dict[str, Bar] = {}
        with StreamProgress() as progress:

            def on_progress(name: str, recorder: Recorder, tokens: int) -> None:
                if name not in bars:
                    bars[name] = progress.add(name, tokens)
                bars[name](recorder.end, f"loss {recorder.running_loss:.3f}")

            result = demo.run(model, stream, settings, on_progress, progress.resident)
        about = {
            "interrupted": interrupted.is_set(),
            "model": model_facts,
            "text": describe_text(stream, stream.restarts),
        }
        report = demo_report.as_dict(result, about)
        demo_report.show(result, about)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
        demo_picture.draw(report, args.plot)
        print(f"Picture: {args.plot}" + (f", figures: {args.json}" if args.json else ""))
    if interrupted.is_set():
        raise KeyboardInterrupt
    return 0


def _candidates(args: argparse.Namespace) -> Iterator[Settings]:
    """What is given stays; for slow models the stream is shorter and fewer tokens are scored."""
    from sinkattn.evaluate.demo import Settings

    given = {field.name: value for field in fields(Settings) if (value := getattr(args, field.name)) is not None}
    least = 2 * (args.num_sinks + args.window)
    for share in SHARES:
        smaller = {
            "tokens": max(round(TOKENS * share), 2 * least),
            "dense_tokens": max(round(DENSE_TOKENS * share), least),
            "samples": max(round(SAMPLES * share), MIN_SAMPLES),
        }
        yield Settings(**{**smaller, **given})
