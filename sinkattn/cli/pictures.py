"""Parts of pictures that several commands share: colours, line styles, and merging of buckets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkattn.cli.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"sinkattn": "#0072b2", "window": "#d55e00", "dense": "#7f7f7f", "recompute": "#009e73"}
SINKS = ("#0072b2", "#56b4e9", "#332288", "#88ccee", "#004488")
WINDOW = COLOURS["window"]
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
MIN_TOKENS = 100


def check_format(path: Path) -> None:
    """Raise ValueError if the suffix is not a picture format, so that a long run need not be repeated."""
    formats = require("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"plot: expected a file ending among {', '.join(sorted(formats))}, got {path.name}")


def merge_buckets(
    series: list[dict[str, Any]], key: str, min_tokens: int = MIN_TOKENS
) -> tuple[list[float], list[float]]:
    """Merge neighbouring buckets to ``min_tokens`` tokens or more; returns their middles and the means of ``key``."""
    middles: list[float] = []
    means: list[float] = []
    total = 0.0
    tokens = 0
    begin = None
    for bucket in series:
        if bucket[key] is None:
            continue
        begin = bucket["begin"] if begin is None else begin
        total += bucket[key] * bucket["tokens"]
        tokens += bucket["tokens"]
        if tokens >= min_tokens:
            middles.append((begin + bucket["end"]) / 2)
            means.append(total / tokens)
            total, tokens, begin = 0.0, 0, None
    return middles, means


def styles(methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line style of each method: blues for sinks, fixed colours for the others; lines that coincide stay visible."""
    fixed = {"dense": COLOURS["dense"], "recomputed": COLOURS["recompute"], "one-shot": COLOURS["dense"]}
    totals = sorted({total for name in methods if (total := _total(name))})
    counts = sorted({int(name.split("+")[0]) for name in methods if "+" in name})
    chosen: dict[str, dict[str, Any]] = {}
    for name, method in methods.items():
        total = _total(name)
        word, index = name.split()[0], totals.index(total) if total else 0
        if word in fixed:
            chosen[name] = {"color": fixed[word], "linewidth": 1.8}
        else:
            rank = counts.index(int(name.split("+")[0]))
            colour = WINDOW if word.startswith("0+") else SINKS[rank % len(SINKS)]
            chosen[name] = {
                "color": colour,
                "linewidth": max(1.0, 3.0 - 0.7 * rank),
                "linestyle": LINES[index % len(LINES)],
            }
            if name != word:  # of 8 bits
                chosen[name] |= {"color": "black", "linewidth": 0.8, "linestyle": ":" if "fp8" in name else "-"}
        if word == "recomputed":
            marker = MARKERS[index % len(MARKERS)]
            chosen[name] |= {"linestyle": "", "marker": marker, "markersize": 8, "markerfacecolor": "none"}
        chosen[name]["label"] = method["label"]
    return chosen


def _total(name: str) -> int | None:
    """Tokens that a method sees, from its name; None if the name has no number."""
    numbers = [int(number) for number in re.findall(r"\b\d+", name)]  # but not of a cache dtype, such as int8
    return sum(numbers) if numbers else None


def vertical_lines(axes: Axes, marks: dict[str, int | None], tokens: int, named: bool = True) -> None:
    """Draw a dotted line at each position within the stream, with its name."""
    for text, position in marks.items():
        if position is None or position >= tokens:
            continue
        axes.axvline(position, color="black", linewidth=0.8, linestyle=":", zorder=0)
        if named:
            at = ("data", "axes fraction")
            axes.annotate(text, (position, 0.02), (-2, 0), at, "offset points", rotation=90, fontsize=7.5, ha="right")


def error_bars(tallies: Sequence[dict[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Accuracies in percent, and the lengths of their confidence intervals below and above."""
    accuracies = [100 * tally["accuracy"] for tally in tallies]
    below = [max(0.0, 100 * (tally["accuracy"] - tally["low"])) for tally in tallies]
    above = [max(0.0, 100 * (tally["high"] - tally["accuracy"])) for tally in tallies]
    return accuracies, [below, above]


def finish(figure: Figure, panels: Sequence[Axes], legend: bool = True) -> None:
    """Add a grid, remove the frame, and draw one legend for all panels."""
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        handles, labels = panels[0].get_legend_handles_labels()
        columns = 4 if max(map(len, labels), default=0) < 25 else 3
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
