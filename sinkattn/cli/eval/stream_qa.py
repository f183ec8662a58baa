"""``sinkattn eval stream-qa``: accuracy on question-answer pairs, joined to one stream."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model
from sinkattn.cli.budget import choose
from sinkattn.cli.eval.arguments import add_caches, add_chat, add_count, add_outputs, counts
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, percent_text
from sinkattn.cli.pictures import error_bars, finish, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.exact_match import Tally
    from sinkattn.evaluate.methods import Predictor

COUNT = 1000
# The time of a question is estimated from so many.
SAMPLE = 20


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "stream-qa", run, "question-answer pairs, end to end in one stream")
    add_model(parser)
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSONL with {"question": "...", "answer": "..."} in each line (default: code to complete)',
    )
    add_chat(parser)
    add_caches(parser)
    add_count(parser, COUNT)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import exact_match
        from sinkattn.evaluate.items import code_items, read_items
        from sinkattn.evaluate.methods import OneShot, Streamed, dense_limit
        from sinkattn.evaluate.text import StandardLibrary
        from sinkattn.hf.chat.template import ChatTemplate

        if args.questions is None:
            items = list(islice(code_items(StandardLibrary().pieces()), args.count or COUNT))
        else:
            items = read_items(args.questions)[: args.count or COUNT]
        template = ChatTemplate.of(session.tokenizer) if args.chat else None
        start = exact_match.start_ids(session.tokenizer, template)
        streamed = [Streamed(session.model, cache) for cache in session.caches((0, 4))]
        predictors: list[Predictor] = [OneShot(session.model, start, dense_limit(streamed[0])), *streamed]
        lengths = [len(exact_match.encode(item, session.tokenizer, template)[0]) for item in items[:SAMPLE]]
        length = sum(lengths) // len(lengths)
        one_shot = session.speed.forward(len(start) - 1 + length)
        forwards = one_shot + len(streamed) * session.speed.forward(length)
        number = choose(counts(args.count and len(items), len(items)), lambda number: number * forwards, args.minutes)
        with session.progress as progress:
            on_progress = session.show_accuracies(predictors, progress.add("questions", number))
            tallies, tokens = exact_match.run(predictors, items, session.tokenizer, number, on_progress, template)
        report = as_dict(args.questions, args.chat, predictors, tallies, tokens)
        session.finish(report, table(report), draw)
    return 0


def as_dict(
    questions: Path | None, chat: bool, predictors: list[Predictor], tallies: list[Tally], tokens: int
) -> dict[str, Any]:
    """The report: accuracy by method. ``questions`` is the file that they are from, ``tokens`` those of the stream."""
    from sinkattn.cli.eval.labels import label

    return {
        "questions": None if questions is None else questions.name,
        "chat": chat,
        "stream_tokens": tokens,
        "methods": {
            predictor.name: {"label": label(predictor), **tally.as_dict()}
            for predictor, tally in zip(predictors, tallies, strict=True)
        },
    }


def table(report: dict[str, Any]) -> Table:
    """One row for each method."""
    out = captioned_table()
    out.add_column("method")
    for name in ("right answers", "95 % interval", "by quarter of the stream"):
        out.add_column(name, justify="right")
    for method in report["methods"].values():
        quarters = "  ".join(map(percent_text, method["accuracy_by_quarter"]))
        interval = f"{method['low']:.1%} to {method['high']:.1%}"
        out.add_row(method["label"], f"{method['accuracy']:.1%}", interval, quarters)
    asked = max(method["questions"] for method in report["methods"].values())
    out.caption = f"{asked:,} questions, a stream of {report['stream_tokens']:,} tokens."
    return out


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw the accuracy of each method as a bar."""
    figure.set_size_inches(7, 0.9 + 0.6 * len(report["methods"]))
    axes = figure.subplots()
    methods = report["methods"]
    names = [method["label"] for method in methods.values()]
    accuracies, spread = error_bars([*methods.values()])
    axes.barh(names, accuracies, xerr=spread, color=[style["color"] for style in styles(methods).values()])
    axes.invert_yaxis()
    axes.set(xlabel="right answers, %", xlim=(0, 100))
    finish(figure, [axes], legend=False)
