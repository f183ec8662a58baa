"""The picture of a demonstration: loss, time per token and memory along the stream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinkattn.report import size_text
from sinkattn.user_errors import require

COLOURS = {"sinkattn": "#0072b2", "window": "#d55e00", "dense": "#7f7f7f", "recompute": "#009e73"}
LEAST_TOKENS = 100


def merged(series: list[dict[str, Any]], key: str, least: int = LEAST_TOKENS) -> tuple[list[float], list[float]]:
    """Means of ``key`` over neighbouring buckets, put together until they hold ``least`` tokens; (middles, means)."""
    middles, means = [], []
    total = tokens = 0
    begin = None
    for bucket in series:
        if bucket[key] is None:
            continue
        begin = bucket["begin"] if begin is None else begin
        total += bucket[key] * bucket["tokens"]
        tokens += bucket["tokens"]
        if tokens >= least:
            middles.append((begin + bucket["end"]) / 2)
            means.append(total / tokens)
            total, tokens, begin = 0, 0, None
    return middles, means


def check_format(path: Path) -> None:
    """Raise ValueError for a file ending that is no picture format, before the work that the picture is of."""
    formats = require("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"plot: expected a file ending among {', '.join(sorted(formats))}, got {path.name}")


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a report (see `sinkattn.report.as_dict`) to a file; its ending says which format.

    Raises:
        UserError: if matplotlib is missing.
        OSError, ValueError: a file that cannot be written, or a format that matplotlib does not know.
    """
    figure = require("matplotlib.figure").Figure(figsize=(13, 4.4), layout="constrained")
    loss, seconds, memory = panels = figure.subplots(1, 3, sharex=True)
    for name, method in report["methods"].items():
        style = {"color": COLOURS[name], "label": method["label"], "linewidth": 1.8}
        if name == "recompute":
            style |= {"linestyle": "", "marker": "o", "markersize": 3.5}
        loss.plot(*merged(method["series"], "loss"), **style)
        middles, means = merged(method["series"], "seconds")
        seconds.plot(middles, [mean * 1e3 for mean in means], **style)
        middles, means = merged(method["series"], "kv_cache_bytes", least=1)
        memory.plot(middles, [mean / 2**20 for mean in means], **style)
        if means:
            place = (middles[-1], means[-1] / 2**20)
            memory.annotate(size_text(means[-1]), place, (-3, 5), textcoords="offset points", ha="right", fontsize=8.5)

    constant = report["sinkattn_constant"]
    change, growth = constant["in_turns"]["change"], size_text(constant["resident_growth_bytes"])
    loss.set_ylabel("nats per token, means of 100 or more")
    seconds.set_ylabel("milliseconds")
    memory.set_ylabel("MiB")
    seconds.set_ylim(bottom=0)
    memory.set_ylim(bottom=0)
    _title(loss, "Loss", "of predicting the next token")
    _title(seconds, "Time per token", f"sinkattn, last tokens against a new stream, in turns: {change:+.1%}")
    _title(memory, "KV cache", f"sinkattn, resident memory once the window is full: +{growth}")

    settings = report["settings"]
    tokens = settings["tokens"]
    places = {
        "window full": settings["num_sinks"] + settings["window"],
        "trained length": report["model"]["trained_length"],
    }
    for axes in panels:
        axes.set(xscale="log", xlabel="token of the stream", xlim=(min(50, tokens / 10), tokens))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for place in places.values():
            if place is not None and place < tokens:
                axes.axvline(place, color="black", linewidth=0.8, linestyle=":", zorder=0)
    for text, place in places.items():
        if place is not None and place < tokens:
            at = ("data", "axes fraction")
            loss.annotate(text, (place, 0.02), (-2, 0), at, "offset points", rotation=90, fontsize=7.5, ha="right")
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _title(axes: Any, title: str, note: str) -> None:
    axes.set_title(title, pad=20)
    axes.annotate(note, (0.5, 1), (0, 6), "axes fraction", "offset points", ha="center", fontsize=8.5)
