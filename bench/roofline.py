"""Draws the bandwidth that decoding reaches on a GPU, beside that of a plain read, from the JSON of `make bench-gpu`.

    python bench/roofline.py bench/results/DEVICE-DATE.json docs/decode-bandwidth.png
    python bench/roofline.py FILE.json FILE.png --read-gbs 4250    # if the run did not time a plain read

All methods are credited with the same bytes: keys and values of sinks and window, read once.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

from matplotlib.figure import Figure

METHODS = {"sinkattn": "o", "sdpa cudnn": "s", "flashinfer": "^", "sdpa flash": "v", "flash-attn": "<", "flex": "x"}


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the bandwidth of decoding beside that of a plain read")
    parser.add_argument("json", type=Path, help="of make bench-gpu")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--read-gbs", type=float, metavar="GB/s", help="of a plain read (default: as the run timed it)")
    args = parser.parse_args()
    run = json.loads(args.json.read_text())
    # One layer of a model of 32 query heads, 8 KV heads, head_dim 128.
    names = re.compile(r"test_decode\[B\d+-W\d+(-H32-Hkv8-D128)?\]")
    rows = [row["extra_info"] for row in run["benchmarks"] if names.fullmatch(row["name"])]
    rows = sorted((row for row in rows if "sinkattn us" in row), key=lambda row: row["MB"])
    if not rows:
        parser.error(f"{args.json}: no benchmark of decoding in it")
    timed = [row["read GB/s"] for row in rows if "read GB/s" in row]
    if not (timed or args.read_gbs):
        parser.error("this run did not time a plain read: give --read-gbs")
    read = args.read_gbs or statistics.median(timed)

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(read, color="black", linestyle="--", label=f"plain read, {read:,.0f} GB/s")
    for method, marker in METHODS.items():
        points = [(row["MB"], 1e3 * row["MB"] / row[f"{method} us"]) for row in rows if row.get(f"{method} us")]
        if points:
            width = 2 if method == "sinkattn" else 1
            axes.plot(*zip(*points, strict=True), marker=marker, label=method, linewidth=width)
    axes.set(xscale="log", xlabel="MB of keys and values, one layer", ylabel="GB/s", ylim=(0, None))
    device = ", ".join(run["machine_info"].get("cuda_devices", []))
    axes.set_title(f"Decoding, bfloat16, {device}, {run['datetime'][:10]}")
    axes.legend()
    figure.savefig(args.picture, dpi=110)


if __name__ == "__main__":
    main()
