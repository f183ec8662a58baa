"""``sinkattn eval sinks``: whether a model has attention sinks, and how many to keep."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from sinkattn.cli.arguments import add_command, add_model, describe_text, positive
from sinkattn.cli.budget import SHARES, add_minutes, choose, stream_length
from sinkattn.cli.eval.arguments import add_outputs, add_text
from sinkattn.cli.eval.session import open_session
from sinkattn.cli.formatting import captioned_table, count_text, range_text, restart_lines
from sinkattn.cli.pictures import finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from sinkattn.cli.arguments import Commands
    from sinkattn.cli.progress import Bar

TOKENS = 10_000


def add_parser(commands: Commands) -> None:
    """Add the command to those of a parser."""
    parser = add_command(commands, "sinks", run, "whether a model has attention sinks, and how many to keep")
    add_model(parser)
    add_text(parser)
    parser.add_argument(
        "--size", type=positive, metavar="N", help="sinks and window together (default: depends on the model)"
    )
    parser.add_argument("--tokens", type=positive, help=f"length of each stream (default: up to {TOKENS})")
    add_minutes(parser)
    add_outputs(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    with open_session(args) as session:
        from sinkattn.evaluate import sinks

        stream = session.stream()
        total = args.size or session.total
        tokens = choose(
            [args.tokens or stream_length(TOKENS, share, total) for share in SHARES],
            lambda each: sinks.seconds(session.speed, total, each),
            args.minutes,
        )
        bars: dict[str, Bar] = {}
        with session.progress as progress:

            def on_progress(name: str, done: int) -> None:
                if name not in bars:
                    bars[name] = progress.add(name, tokens)
                bars[name](done)

            result = sinks.run(session.model, stream, total, tokens, on_progress)
        report = {"tokens": tokens, **result.as_dict(), "text": describe_text(stream, result.restarts)}
        session.finish(report, table(report), draw)
    return 0


def table(report: dict[str, Any]) -> Table:
    """One row for each beginning of the stream, one column for each number of sinks."""
    out = captioned_table()
    out.add_column("the stream\nbegins with")
    beginnings = report["beginnings"]
    none, *counts = next(iter(beginnings.values()))["losses"]
    out.add_column("no sinks\nloss", justify="right")
    for count in counts:
        out.add_column(f"{count_text(int(count), 'sink')}\nless by", justify="right")
    for name, each in beginnings.items():
        gains = [_margin_text(-each["gains"][count]["loss"], each["gains"][count]["margin"]) for count in counts]
        out.add_row(name, _margin_text(each["losses"][none]["loss"], each["losses"][none]["margin"]), *gains)
    counted = range_text((each["losses"][none]["tokens"] for each in beginnings.values()), "token")
    lines = [
        report["verdict"],
        f"Recommended: num_sinks={report['recommended_num_sinks']}.",
        f"Losses of {counted}, once the cache of {report['cache']:,} is full.",
    ]
    attention = report["attention_on_first_tokens"]
    if not report["attention_tokens"]:
        lines.append("The attention was not measured.")
    elif attention is None:
        lines.append("This model does not return its attention.")
    else:
        tokens = report["attention_tokens"]
        heads = [(weight, layer, head) for layer, rows in enumerate(attention) for head, weight in enumerate(rows[0])]
        most = ", ".join(f"{weight:.2f} (layer {layer}, head {head})" for weight, layer, head in sorted(heads)[:-5:-1])
        lines.append(
            f"Attention on the first token, in the second half of {tokens} tokens, where even attention would be "
            f"{2 * math.log(2) / tokens:.3f}: {most}"
        )
    out.caption = "\n".join(lines + restart_lines(report["text"]))
    return out


def _margin_text(loss: float, margin: float | None) -> str:
    return f"{loss:.3f}" + ("" if margin is None else f" ± {margin:.3f}")


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw the gains by number of sinks and, where the model returns it, the attention on the first token."""
    attention = report["attention_on_first_tokens"]
    figure.set_size_inches(11 if attention else 6, 4)
    axes, *rest = [figure.subplots()] if attention is None else figure.subplots(1, 2)
    for name, each in report["beginnings"].items():
        gains = each["gains"]
        margins = [gain["margin"] or 0.0 for gain in gains.values()]
        losses = [gain["loss"] for gain in gains.values()]
        axes.errorbar(list(map(str, gains)), losses, margins, marker="o", capsize=3, label=name)
    axes.set(xlabel=f"sinks, in a cache of {report['cache']} tokens", ylabel="loss minus that without, nats per token")
    axes.set_title("What sinks are worth, by how the stream begins")
    axes.legend(frameon=False)
    for heatmap in rest:
        num_heads = max(len(rows[0]) for rows in attention)
        # Layers may differ in their number of heads: pad with NaN.
        weights = [rows[0] + [math.nan] * (num_heads - len(rows[0])) for rows in attention]
        image = heatmap.imshow(weights, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        heatmap.set(xlabel="head", ylabel="attention layer")
        heatmap.locator_params(integer=True)
        heatmap.set_title("Mean attention on the first token")
        figure.colorbar(image, ax=heatmap)
    finish(figure, [axes], legend=False)
