"""``sinkattn eval chat``: a chat of many rounds in one stream, with and without sinks."""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import (
    add_chat_model,
    add_command,
    add_compile,
    add_sampling,
    announce_compilation,
    positive,
    sampling,
)
from sinkattn.cli.budget import add_minutes, choose
from sinkattn.cli.eval.arguments import add_caches, add_outputs, counts
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, percent_text, size_text
from sinkattn.cli.pictures import finish, styles

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.chat import Round
    from sinkattn.evaluate.methods import Streamed

ROUNDS = 20


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "chat", run, "a chat of many rounds in one stream, in the model's chat template")
    add_chat_model(parser)
    add_compile(parser)
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help='JSONL with {"question": "..."} in each line (default: a hundred everyday questions)',
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        metavar="N",
        help=f"rounds of the chat; after the last question comes the first again (default: up to {ROUNDS})",
    )
    parser.add_argument(
        "--max-reply",
        type=positive,
        default=60,
        metavar="N",
        help="tokens after which a reply is cut off (default: %(default)s)",
    )
    add_caches(parser, ["0+512", "4+508"])
    add_sampling(parser, seed=0)
    add_minutes(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate.chat import converse, everyday_questions, question_tokens
        from sinkattn.evaluate.interruption import Interrupted
        from sinkattn.evaluate.items import read_questions
        from sinkattn.evaluate.methods import Streamed

        params = sampling(args, session.model)
        questions = everyday_questions() if args.questions is None else read_questions(args.questions)
        caches = session.caches(())
        length = question_tokens(session.tokenizer, questions)
        each_round = session.speed.forward(length) + args.max_reply * session.speed.step
        numbers = counts(args.rounds, ROUNDS)
        number = choose(numbers, lambda number: number * len(caches) * each_round, args.minutes)
        chats: dict[Streamed, list[Round]] = {}
        announce_compilation(args)
        with session.progress as progress:
            try:
                for cache in caches:
                    streamed = Streamed(session.model, cache, compile=args.compile)
                    bar = progress.add(streamed.name, number)
                    asked = islice(cycle(questions), number)
                    for each in converse(streamed, session.tokenizer, asked, args.max_reply, params):
                        rounds = chats.setdefault(streamed, [])
                        rounds.append(each)
                        bar(len(rounds), f"{sum(each.ended for each in rounds)} replies ended by themselves")
            except Interrupted:
                if not chats:
                    raise
        settings = {
            "questions": None if args.questions is None else args.questions.name,
            "rounds": number,
            "max_reply": args.max_reply,
            "sampling": {**vars(params)},
        }
        report = as_dict(settings, chats)
        session.finish(report, table(report), draw)
    return 0


def as_dict(settings: dict[str, Any], chats: dict[Streamed, list[Round]]) -> dict[str, Any]:
    """The report: figures and text of the chat with each cache."""
    from sinkattn.cli.eval.labels import label
    from sinkattn.evaluate.chat import summary

    shown = ("question", "reply", "tokens", "ended", "well_formed", "repeated")
    return {
        "settings": settings,
        "methods": {
            streamed.name: {
                "label": label(streamed),
                **summary(rounds, settings["rounds"]),
                "chat": [{name: getattr(each, name) for name in shown} for each in rounds],
            }
            for streamed, rounds in chats.items()
        },
    }


def table(report: dict[str, Any]) -> Table:
    """One row for each cache."""
    out = captioned_table()
    out.add_column("cache")
    for header in (
        "ended by\nthemselves",
        "well-\nformed",
        "tokens of a reply,\nby quarter of the chat",
        "repeated within a reply,\nby quarter",
        "ms per token,\nfirst and last quarter",
        "KV cache, first\nand last round",
    ):
        out.add_column(header, justify="right")
    for method in report["methods"].values():
        shares = [f"{method[name]} of {method['rounds']}" for name in ("ended", "well_formed")]
        tokens = "  ".join(_number_text(value, 1) for value in method["reply_tokens_by_quarter"])
        repeated = "  ".join(map(percent_text, method["repeated_by_quarter"]))
        seconds = method["seconds_by_quarter"]
        ms = "  ".join(_number_text(value, 1e3) for value in (seconds[0], seconds[-1]))
        out.add_row(method["label"], *shares, tokens, repeated, ms, "  ".join(map(size_text, method["kv_bytes"])))
    out.caption = (
        "Well-formed: each turn opened and closed once, and no special token within a reply.\n"
        f"A reply that has not ended after {report['settings']['max_reply']} tokens is cut off and closed."
    )
    return out


def _number_text(value: float | None, factor: float) -> str:
    return "none" if value is None else f"{value * factor:.1f}"


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw, by quarter of the chat, the replies that ended by themselves and the repetition within replies."""
    figure.set_size_inches(11, 4)
    panels = figure.subplots(1, 2)
    names = {"ended_by_quarter": "replies that ended by themselves, %", "repeated_by_quarter": "repeated tokens, %"}
    for axes, (name, text) in zip(panels, names.items(), strict=True):
        for method, style in styles(report["methods"]).items():
            shares = report["methods"][method][name]
            axes.plot([1, 2, 3, 4], [100 * share if share is not None else None for share in shares], **style)
        axes.set(xlabel="quarter of the chat", ylabel=text, ylim=(-3, 103), xticks=[1, 2, 3, 4])
    finish(figure, [*panels])
