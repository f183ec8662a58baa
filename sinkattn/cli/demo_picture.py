"""The picture of `sinkattn demo`: loss, time per token and KV cache along the stream."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.errors import require
from sinkattn.cli.formatting import size_text
from sinkattn.cli.pictures import COLOURS, merge_buckets, vertical_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw a report of `demo_report.as_dict` to a file, in the format of its suffix.

    Raises:
        UserError: if matplotlib is missing.
        OSError, ValueError: for a file that cannot be written, or a format that matplotlib does not support.
    """
    figure = require("matplotlib.figure").Figure(figsize=(13, 4.4), layout="constrained")
    loss, seconds, memory = panels = figure.subplots(1, 3, sharex=True)
    for name, method in report["methods"].items():
        style: dict[str, Any] = {"color": COLOURS[name], "label": method["label"], "linewidth": 1.8}
        if name == "recompute":
            style |= {"linestyle": "", "marker": "o", "markersize": 3.5}
        loss.plot(*merge_buckets(method["series"], "loss"), **style)
        middles, means = merge_buckets(method["series"], "seconds")
        seconds.plot(middles, [mean * 1e3 for mean in means], **style)
        middles, means = merge_buckets(method["series"], "kv_cache_bytes", min_tokens=1)
        memory.plot(middles, [mean / 2**20 for mean in means], **style)
        if means:
            end = (middles[-1], means[-1] / 2**20)
            memory.annotate(size_text(means[-1]), end, (-3, 5), textcoords="offset points", ha="right", fontsize=8.5)

    constant = report["sinkattn_constant"]
    turns, growth = constant["in_turns"], size_text(constant["resident_growth_bytes"])
    loss.set_ylabel("nats per token, means of 100 or more")
    seconds.set_ylabel("milliseconds")
    memory.set_ylabel("MiB")
    seconds.set_ylim(bottom=0)
    memory.set_ylim(bottom=0)
    _title(loss, "Loss", "of predicting the next token")
    change = f"sinkattn, last tokens against a new stream, in turns: {turns['change']:+.1%}" if turns else ""
    _title(seconds, "Time per token", change)
    _title(memory, "KV cache", f"sinkattn, resident memory once the window is full: +{growth}")

    settings = report["settings"]
    tokens = settings["tokens"]
    marks = {
        "window full": settings["num_sinks"] + settings["window"],
        "trained length": report["model"]["trained_length"],
    }
    for axes in panels:
        axes.set(xscale="log", xlabel="token of the stream", xlim=(min(50, tokens / 10), tokens))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        vertical_lines(axes, marks, tokens, named=axes is loss)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, pad=20)
    axes.annotate(note, (0.5, 1), (0, 6), "axes fraction", "offset points", ha="center", fontsize=8.5)
