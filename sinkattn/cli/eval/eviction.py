"""``sinkattn eval eviction``: whole messages or tokens leave, the whole system prompt or a few sinks stay."""

from __future__ import annotations

import argparse
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_chat_model, add_command, add_sampling, positive, sampling
from sinkattn.cli.budget import add_minutes, choose
from sinkattn.cli.errors import UserError
from sinkattn.cli.eval.arguments import add_outputs, counts
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, count_text
from sinkattn.cli.pictures import finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.evaluate.eviction import Way
    from sinkattn.evaluate.statistics import Blocks

ROUNDS = 60
UNITS = {"token": "tokens", "message": "messages", "turn": "questions with their replies"}


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    text = "what it costs or brings to forget whole messages of a chat, and to keep the whole system prompt"
    parser = add_command(commands, "eviction", run, text)
    add_chat_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt of the chat (default: one of a ship's cook)")
    parser.add_argument(
        "--total", type=positive, metavar="N", help="tokens in sight, the same each way (default: depends on the model)"
    )
    parser.add_argument("--rounds", type=positive, metavar="N", help=f"rounds of the chat (default: up to {ROUNDS})")
    parser.add_argument(
        "--max-reply",
        type=positive,
        default=60,
        metavar="N",
        help="tokens after which a reply is cut off (default: %(default)s)",
    )
    add_sampling(parser, seed=0)
    add_minutes(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import eviction
        from sinkattn.evaluate.chat import converse, everyday_questions
        from sinkattn.evaluate.interruption import Interrupted
        from sinkattn.evaluate.methods import CacheSize, Streamed
        from sinkattn.hf.chat.encoder import MessageEncoder
        from sinkattn.hf.model_config import trained_length

        params = sampling(args, session.model)
        system = eviction.SYSTEM if args.system is None else args.system
        questions, total = everyday_questions(), args.total or min(512, session.total)
        encoder = MessageEncoder(session.tokenizer, system)
        ways = eviction.ways(len(encoder.prefix), total)
        longest = encoder.longest_turn(questions, args.max_reply)
        # The chat is one with everything in sight, up to the length that the model was trained for.
        trained = trained_length(session.model)
        most = args.rounds or ROUNDS if trained is None else (trained - len(encoder.prefix)) // longest
        if (args.rounds or 1) > most:
            raise UserError(
                f"rounds: expected up to {most}, whose chat fits the {trained} tokens that the model was trained for, "
                f"got {args.rounds or 1}; a smaller --max-reply makes room for more"
            )
        rounds = choose(
            counts(args.rounds, min(ROUNDS, most)),
            lambda rounds: eviction.seconds(session.speed, rounds, longest, args.max_reply, len(ways) + 1),
            args.minutes,
        )
        all_of_it = eviction.Way(0, len(encoder.prefix) + rounds * longest, "token")
        _check_total(total, all_of_it.window, f"at most, in {count_text(rounds, 'round')}")
        losses: dict[eviction.Way, Blocks] = {}
        with session.progress as progress:
            streamed, chat = Streamed(session.model, CacheSize(0, all_of_it.window)), []
            bar = progress.add("the chat", rounds)
            asked = islice(cycle(questions), rounds)
            for each in converse(streamed, session.tokenizer, asked, args.max_reply, params, system):
                chat.append(each)
                bar(len(chat))
            dialogue = eviction.Dialogue.of(encoder, chat)
            _check_total(total, len(dialogue.ids), f"in {count_text(rounds, 'round')}")
            try:
                for way in (all_of_it, *ways):
                    bar = progress.add(_name(way), len(dialogue.ids))
                    losses[way] = eviction.blocks(eviction.losses(session.model, dialogue, way, bar), total)
            except Interrupted:
                if not losses:
                    raise
        settings = {
            "system": system,
            "prefix_tokens": dialogue.num_prefix,
            "total": total,
            "rounds": rounds,
            "tokens": len(dialogue.ids),
            "max_reply": args.max_reply,
            "sampling": {**vars(params)},
        }
        report = as_dict(settings, losses)
        session.finish(report, table(report), draw)
    return 0


def _check_total(total: int, tokens: int, where: str) -> None:
    if total >= tokens:
        raise UserError(
            f"total: expected less than the chat has, {tokens} tokens {where}, got {total}; give a smaller --total or "
            "more --rounds"
        )


def _name(way: Way) -> str:
    return f"{way.num_sinks}+{way.window} {way.unit}"


def as_dict(settings: dict[str, Any], losses: dict[Way, Blocks]) -> dict[str, Any]:
    """The report: the loss each way, and what it is more than where tokens leave and a few sinks stay."""
    # With everything in sight is the first one.
    reference = dict(enumerate(losses.values())).get(1)
    methods = {}
    for way, own in losses.items():
        mean, change = own.mean(), reference and own.difference(reference)
        methods[_name(way)] = {
            "num_sinks": way.num_sinks,
            "window": way.window,
            "unit": way.unit,
            "loss": mean and mean.as_dict(),
            "change": change.as_dict() if change and own is not reference else None,
        }
    return {"settings": settings, "methods": methods}


def table(report: dict[str, Any]) -> Table:
    """One row for each way."""
    settings = report["settings"]
    out = captioned_table()
    for header in ("always in sight", "what leaves at a time"):
        out.add_column(header)
    for header in ("window", "loss", "more than with\nsinks and tokens"):
        out.add_column(header, justify="right")
    for method in report["methods"].values():
        stays, leaves = _stays(method, settings)
        loss, change = method["loss"], method["change"]
        more = "" if change is None else f"{change['loss']:+.4f}{_margin_text(change)}"
        out.add_row(stays, leaves, f"{method['window']:,}", f"{loss['loss']:.4f}" if loss else "none", more)
    count = next(iter(report["methods"].values()))["loss"]
    out.caption = (
        f"Nats per token, over {count_text(count['tokens'] if count else 0, 'token')} of replies from token "
        f"{settings['total']:,} on, of a chat of {settings['tokens']:,} tokens that was made with everything in "
        f"sight.\nAll other ways see up to {settings['total']:,} tokens. ± is the 95 % confidence interval."
    )
    return out


def _stays(method: dict[str, Any], settings: dict[str, Any]) -> tuple[str, str]:
    if not method["num_sinks"]:
        return "everything", "nothing"
    whole = method["num_sinks"] == settings["prefix_tokens"]
    name = f"system prompt, {method['num_sinks']} tokens" if whole else f"{method['num_sinks']} sinks"
    return name, UNITS[method["unit"]]


def _margin_text(mean: dict[str, Any]) -> str:
    return "" if mean["margin"] is None else f" ± {mean['margin']:.4f}"


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """What each way costs."""
    figure.set_size_inches(9, 4)
    axes = figure.subplots()
    methods = [each for each in report["methods"].values() if each["change"]]
    names = [", ".join(_stays(each, report["settings"])) for each in methods]
    margins = [each["change"]["margin"] or 0 for each in methods]
    axes.barh(names[::-1], [each["change"]["loss"] for each in methods][::-1], xerr=margins[::-1])
    axes.set(xlabel="loss more than with sinks and tokens, nats per token")
    finish(figure, [axes])
