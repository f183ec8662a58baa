"""Report, tables and picture of ``sinkattn learn`` and ``sinkattn eval learn``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkattn.cli.formatting import captioned_table, percent_text, restart_lines
from sinkattn.cli.pictures import finish
from sinkattn.evaluate.variant import DECAY, FROZEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Group
    from rich.table import Table

    from sinkattn.evaluate.learn import Result, Stretch
    from sinkattn.evaluate.statistics import Blocks, Mean

FROZEN_COLOUR = "#7f7f7f"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def as_dict(result: Result, names: list[str] | None = None) -> dict[str, Any]:
    """The report of a result. Losses are in nats, times in seconds.

    Args:
        result: the measurements.
        names: the text of each stretch; None if it is always the same.
    """
    settings = result.settings
    sizes = {name: getattr(settings, name) for name in ("tokens", "stretch", "chunk", "seed")}
    return {
        "settings": {"cache": str(settings.cache), **sizes, "decay": DECAY},
        "tokens": result.tokens,
        "timed_tokens": result.timed,
        "methods": {name: _method_dict(result, name) for name in result.seconds},
        "stretches": [
            _stretch_dict(result, stretch, names[index] if names else None)
            for index, stretch in enumerate(result.stretches)
        ],
    }


def _method_dict(result: Result, name: str) -> dict[str, Any]:
    learner, seconds = result.learners.get(name), result.seconds[name]
    return {
        "parameters": sum(x.numel() for x in learner.parameters.values()) if learner else 0,
        "rate": learner.optimizer.param_groups[0]["lr"] if learner else None,
        "updates": learner.num_updates if learner else 0,
        **_mean_dict(result.mean(name)),
        "minus_frozen": _difference_dict(result.minus_frozen(name)) if learner else None,
        "tokens_per_second": result.timed / seconds if seconds else None,
        "learning_share": 1 - result.seconds[FROZEN] / seconds if learner and seconds else None,
    }


def _stretch_dict(result: Result, stretch: Stretch, text: str | None) -> dict[str, Any]:
    frozen = stretch.losses[FROZEN]
    return {
        "begin": stretch.begin,
        "end": stretch.end,
        "text": text,
        "methods": {name: _compared(blocks, frozen) for name, blocks in stretch.losses.items()},
        "held_out": {
            text: {
                FROZEN: _compared(blocks, blocks),
                **{name: _compared(losses[text], blocks) for name, losses in stretch.held_out.items()},
            }
            for text, blocks in result.held_out.items()
        },
    }


def _compared(blocks: Blocks, frozen: Blocks) -> dict[str, Any]:
    from sinkattn.evaluate.learn import minus_frozen

    difference = None if blocks is frozen else minus_frozen(blocks, frozen)
    return {**_mean_dict(blocks.mean()), "minus_frozen": _difference_dict(difference)}


def _mean_dict(mean: Mean | None) -> dict[str, Any]:
    assert mean is not None
    return mean.as_dict()


def _difference_dict(difference: Mean | None) -> dict[str, Any] | None:
    return None if difference is None else {"loss": difference.loss, "margin": difference.margin}


def tables(report: dict[str, Any]) -> Group:
    """The whole stream, its stretches, and what is held out."""
    from rich.console import Group

    parts = [_whole_table(report), _stretch_table(report)]
    if report["stretches"][-1]["held_out"]:
        parts.append(_held_out_table(report))
    return Group(*parts)


def _learners(report: dict[str, Any]) -> list[str]:
    return [name for name, method in report["methods"].items() if method["minus_frozen"]]


def _whole_table(report: dict[str, Any]) -> Table:
    out, settings = captioned_table(), report["settings"]
    out.title = f"The whole stream, {report['tokens']:,} tokens"
    out.add_column("method")
    headers = (
        "learns",
        "rate",
        "updates",
        "loss",
        "perplexity",
        "loss minus frozen",
        "tokens\nper second",
        "time spent\nlearning",
    )
    for header in headers:
        out.add_column(header, justify="right")
    for name, method in report["methods"].items():
        speed, share = method["tokens_per_second"], method["learning_share"]
        out.add_row(
            name,
            f"{method['parameters']:,}" if method["parameters"] else "nothing",
            "" if method["rate"] is None else f"{method['rate']:g}",
            f"{method['updates']:,}",
            f"{method['loss']:.3f}",
            f"{method['perplexity']:.2f}",
            difference_text(method["minus_frozen"]),
            "" if speed is None else f"{speed:,.0f}",
            "" if share is None else percent_text(share),
        )
    lines = [
        "Losses in nats per token, of tokens that have not been learned from yet.",
        "±: half a 95 % confidence interval, from paired differences of 8 blocks of the stream.",
        f"Read in turn, {settings['cache']} tokens in sight, in chunks of {settings['chunk']}.",
        "Time spent learning: what they take longer than the frozen model.",
    ]
    if any("+decay" in name for name in report["methods"]):
        lines.append(f"+decay: {settings['decay']:.0%} of the way back to the first weights after every update.")
    if restarts := restart_lines(report["text"]):
        lines += [
            *restarts,
            "From there on its tokens have been learned from before, and what is held out is read too.",
        ]
    out.caption = "\n".join(lines)
    return out


def _stretch_table(report: dict[str, Any]) -> Table:
    out, learners, stretches = captioned_table(), _learners(report), report["stretches"]
    out.title = "By stretch: perplexity of the frozen model, loss minus frozen"
    has_texts = any(each["text"] for each in stretches)
    out.add_column("tokens", justify="right")
    if has_texts:
        out.add_column("text")
    for header in (FROZEN, *learners):
        out.add_column(header, justify="right")
    for each in stretches:
        methods = each["methods"]
        cells = [f"{each['begin']:,} to {each['end'] - 1:,}", *([each["text"]] if has_texts else [])]
        cells.append(f"{methods['frozen']['perplexity']:.2f}")
        out.add_row(*cells, *(difference_text(methods[name]["minus_frozen"]) for name in learners))
    return out


def _held_out_table(report: dict[str, Any]) -> Table:
    out, learners = captioned_table(), _learners(report)
    ends = [each["held_out"] for each in report["stretches"] if learners[0] in next(iter(each["held_out"].values()))]
    out.title = "Held out: perplexity of the frozen model, loss minus frozen at the end (and at worst)"
    out.add_column("text")
    for header in (FROZEN, *learners):
        out.add_column(header, justify="right")
    for text in report["stretches"][-1]["held_out"]:
        cells = []
        for name in learners:
            changes = [end[text][name]["minus_frozen"] for end in ends]
            worst = max((change["loss"] for change in changes), default=None)
            cells.append(f"{difference_text(changes[-1])} ({worst:+.3f})" if changes else "")
        out.add_row(text, f"{report['stretches'][-1]['held_out'][text]['frozen']['perplexity']:.2f}", *cells)
    out.caption = "More than 0: worse on the held-out text than before the stream. At worst: after a stretch."
    return out


def difference_text(difference: dict[str, Any] | None) -> str:
    """A difference of losses with its margin."""
    if difference is None:
        return ""
    margin = "" if difference["margin"] is None else f" ± {difference['margin']:.3f}"
    return f"{difference['loss']:+.3f}{margin}"


def draw(figure: Figure, report: dict[str, Any]) -> None:
    """Draw perplexity and loss minus frozen along the stream, and what is held out after every stretch."""
    figure.set_size_inches(13, 4.6)
    stretches, learners = report["stretches"], _learners(report)
    texts = list(stretches[-1]["held_out"])[:1]
    panels = list(figure.subplots(1, 2 + len(texts)))
    middles = [(each["begin"] + each["end"]) / 2 for each in stretches]
    panels[0].plot(
        middles, [each["methods"][FROZEN]["perplexity"] for each in stretches], ".-", color=FROZEN_COLOUR, label=FROZEN
    )
    for index, name in enumerate(learners):
        colour = COLOURS[index % len(COLOURS)]
        methods = [each["methods"][name] for each in stretches]
        panels[0].plot(middles, [each["perplexity"] for each in methods], ".-", color=colour, label=name)
        _draw_differences(panels[1], middles, [each["minus_frozen"] for each in methods], colour)
        for text, axes in zip(texts, panels[2:], strict=True):
            ends = [each for each in stretches if name in each["held_out"][text]]
            _draw_differences(
                axes,
                [0, *(each["end"] for each in ends)],
                [{"loss": 0.0, "margin": 0.0}, *(each["held_out"][text][name]["minus_frozen"] for each in ends)],
                colour,
            )
    panels[0].set(title="Perplexity of tokens not yet learned from", ylabel="perplexity")
    panels[1].set(title="Loss minus that of the frozen model", ylabel="nats per token")
    for text, axes in zip(texts, panels[2:], strict=True):
        axes.set(title=f"The same, held out: {text}", ylabel="nats per token")
    for axes in panels:
        axes.set(xlabel="token of the stream")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=4)
        axes.margins(y=0.1)
        _draw_texts(axes, stretches)
    for axes in panels[1:]:
        axes.axhline(0, color=FROZEN_COLOUR, linewidth=1)
    finish(figure, panels)


def _draw_differences(axes: Axes, places: list[float], differences: list[dict[str, Any]], colour: str) -> None:
    """Differences, with the confidence intervals of those that have one."""
    axes.plot(places, [each["loss"] for each in differences], ".-", color=colour)
    known = [(place, each) for place, each in zip(places, differences, strict=True) if each["margin"] is not None]
    low, high = ([each["loss"] + sign * each["margin"] for _, each in known] for sign in (-1, 1))
    axes.fill_between([place for place, _ in known], low, high, color=colour, alpha=0.15, linewidth=0)


def _draw_texts(axes: Axes, stretches: list[dict[str, Any]]) -> None:
    """A dotted line where another text begins, with its name."""
    before = None
    for each in stretches:
        if each["text"] != before:
            axes.axvline(each["begin"], color="black", linewidth=0.8, linestyle=":", zorder=0)
            axes.annotate(
                each["text"],
                (each["begin"], 0.98),
                (2, 0),
                ("data", "axes fraction"),
                "offset points",
                fontsize=7.5,
                va="top",
            )
        before = each["text"]


def live_line(report: dict[str, Any]) -> str:
    """The last stretch in one line."""
    stretch, [name] = report["stretches"][-1], _learners(report)
    losses = {method: each["loss"] for method, each in stretch["methods"].items()}
    line = (
        f"tokens {stretch['begin']:,} to {stretch['end'] - 1:,}: loss {losses[name]:.3f}, {FROZEN} {losses[FROZEN]:.3f}"
    )
    return f"{line} ({difference_text(stretch['methods'][name]['minus_frozen'])})"
