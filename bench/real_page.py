"""The page that `make real` writes: what every step printed and drew, beside the paper's figures."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sinkattn.cli.formatting import count_text
from sinkattn.cli.pictures import COLOURS, finish

COUNTS = ("0", "1", "2", "4", "8")
# The paper's table 2: perplexity over 400,000 tokens of PG19, by number of sinks.
PAPER = {
    "Falcon-7B, 2048": (17.90, 12.12, 12.12, 12.12, 12.12),
    "MPT-7B, 2048": (460.29, 14.99, 15.00, 14.99, 14.98),
    "Pythia-12B, 2048": (21.62, 11.95, 12.09, 12.09, 12.02),
    "Llama-2-7B, 4096": (3359.95, 11.88, 10.51, 9.59, 9.54),
}
TABLE_2 = "table-2.png"
TITLES = {
    "ppl-256": "Loss along the stream, cache of 256",
    "ppl-1024": "Loss along the stream, cache of 1,024",
    "sinks": "Attention sinks",
    "agreement": "Agreement with a plain model far behind the cache",
    "endless": "One stream without a break",
    "latency": "Time and memory",
    "streameval": "StreamEval",
    "stream-qa": "Streaming question answering",
    "chat": "A chat of many rounds",
    "learn": "Learning on the stream",
}
FIGURE_3 = """In the paper's figure 3 the dense model fails beyond its trained length, the window without sinks as soon
as the first tokens leave the cache, and sinks + window stay at the loss of recomputation."""
NOTES = {
    "ppl-256": FIGURE_3,
    "ppl-1024": FIGURE_3,
    "endless": "In the paper's figure 5 perplexities are stable over four million tokens.",
    "latency": "The paper's figure 10 has the same curves, of Llama 2 on a GPU.",
    "streameval": "The paper's table 7: recall ends where the cache ends.",
    "stream-qa": """The paper's table 5: with sinks as many right answers as one by one, without them nearly none. The
questions are capitals that a model of this size knows, and only whole sentences count, so in a stream earlier answers
help: they show the form.""",
    "learn": """Dynamic evaluation in the literature: perplexity 18.3 to 16.4 on WikiText-103 (Krause 2019), with models
that were trained on that text.""",
    "agreement": "The plain model, `tests/evaluate/naive.py`, has no cache: fp64, keys gathered and rotated anew.",
}


def write(folder: Path, names: list[str]) -> Path:
    """Write README.md, and the picture beside the paper's table 2, from what the folder has; returns its path."""
    reports = {name: json.loads(path.read_text()) for name in names if (path := folder / f"{name}.json").is_file()}
    lines = ["# A pretrained model: SmolLM2-135M-Instruct", ""]
    lines += ["Written by `make real` ([bench/real.py](../../../bench/real.py)): 135 M parameters, Llama architecture,"]
    lines += ["trained on up to 8,192 tokens, from a GGUF file of 4 bits. Methods and intervals are those of"]
    lines += ["[evaluation.md](../../evaluation.md). A run takes hours, beside other work at times, so compare times"]
    lines += ["only within a table; [benchmarks.md](../../benchmarks.md) has those of an idle machine."]
    if missing := [name for name in names if name not in reports]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    if rows := table_2(reports):
        lines += ["", "## Beside the paper's table 2", "", *rows_text(rows), "", f"![Perplexity by sinks]({TABLE_2})"]
        draw(rows, folder / TABLE_2)
    for name, report in reports.items():
        lines += ["", f"## {TITLES[name]}", "", f"`{report['command']}`, {report['seconds'] / 60:.1f} minutes on"]
        threads = count_text(report["machine"]["threads"], "thread")
        lines += [f"{report['machine']['processor']}, {threads}:", ""]
        lines += ["```text", (folder / f"{name}.txt").read_text(encoding="utf-8").rstrip(), "```"]
        if name in NOTES:
            lines += ["", NOTES[name]]
        if (folder / f"{name}.png").is_file():
            lines += ["", f"![{TITLES[name]}]({name}.png)"]
    path = folder / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def table_2(reports: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Perplexities by number of sinks: ours, then the paper's; empty without ours."""
    ours = {}
    for name, report in reports.items():
        if not name.startswith("ppl"):
            continue
        by_sinks = {key.split("+")[0]: each["all"] for key, each in report["methods"].items() if "+" in key}
        tokens = by_sinks["0"]["tokens"]
        label = f"SmolLM2-135M, {name.removeprefix('ppl-')}, {tokens:,} tokens"
        ours[label] = tuple(by_sinks[count]["perplexity"] for count in COUNTS)
    return {**ours, **PAPER} if ours else {}


def rows_text(rows: dict[str, tuple[float, ...]]) -> list[str]:
    """The rows as a table of Markdown, with the ratio that can be compared."""
    head = ["| perplexity, by sinks | " + " | ".join(COUNTS) + " | 0 sinks / 8 | 1 sink / 8 |", "|---" * 8 + "|"]
    out = []
    for label, values in rows.items():
        ratios = (values[0] / values[-1], values[1] / values[-1])
        out.append(f"| {label} | " + " | ".join(f"{each:.2f}" for each in (*values, *ratios)) + " |")
    return head + out


def draw(rows: dict[str, tuple[float, ...]], path: Path) -> None:
    """Draw the perplexities relative to those with eight sinks."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, (label, values) in enumerate(rows.items()):
        paper = label in PAPER
        style = {"color": COLOURS["dense"], "linestyle": ("-", "--", ":", "-.")[number % 4]} if paper else {}
        ratios = [value / values[-1] for value in values]
        axes.plot(COUNTS, ratios, marker=".", linewidth=1 if paper else 2.4, label=label, **style)
    axes.set(yscale="log", xlabel="sinks", ylabel="perplexity / that with 8 sinks")
    axes.set_title("Window without sinks, and with: ours, and the paper's table 2 (grey)")
    finish(figure, [axes])
    figure.savefig(path, dpi=150)
