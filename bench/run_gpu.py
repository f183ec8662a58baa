"""Runs all GPU benchmarks within ten minutes, and writes JSON and the report as text.

    make bench-gpu                          # into bench/results/DEVICE-DATE.json and .txt
    make bench-gpu ARGS="--json FILE"
    make bench-gpu ARGS="--quick"           # only the shapes that decide, about three minutes
    make bench-gpu ARGS="--rehearse"        # tiny shapes on the CPU, to check that everything works

Each part runs in its own process, so that a crash does not affect the others; the most important ones run first. A part
that exceeds its time limit is killed, and its results until then are kept: in the JSON, under "unfinished".
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sinkattn import ops

HERE = Path(__file__).parent
SECONDS_TO_WRITE = 10  # for a part to write its results


@dataclass
class Part:
    """Benchmarks that share a process, and their time limit in seconds: about twice what they should take."""

    targets: list[str]
    seconds: float


PARTS = {
    "decode": Part(["gpu_attention.py::test_decode"], 240),
    "model": Part(["gpu_model.py"], 180),
    "pool": Part(["gpu_pool.py"], 120),
    "chunk": Part(["gpu_attention.py::test_chunk", "gpu_attention.py::test_append"], 90),
    "gradients": Part(["gpu_gradients.py"], 90),
    "compiled": Part(["gpu_compiled.py"], 240),
}
# The shapes that decide, in three minutes.
QUICK = "B1-W4096 or B8-W1024 or B64-W4096 or T4096-W4096 or T64-W4096 or test_token or test_generate"
QUICK_PARTS = ("decode", "chunk", "model")
# One process for all, since starting processes takes most of the time of a rehearsal.
REHEARSED = {"rehearsed": Part([target for part in PARTS.values() for target in part.targets], 600)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="run the GPU benchmarks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/DEVICE-DATE.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="time limit of all parts (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="run only this part; may be repeated")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only benchmarks that match, as in pytest")
    parser.add_argument("--quick", action="store_true", help="only the shapes that decide, in about three minutes")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with tiny shapes")
    args = parser.parse_args()
    if args.quick:
        args.only, args.k = args.only or list(QUICK_PARTS), args.k or QUICK
    return args


def check_device() -> str:
    """Name of the GPU; exits if there is nothing to time."""
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: torch sees no CUDA device here; ARGS=--rehearse tries the benchmarks out on the CPU")
    if ops.select_backend(torch.device("cuda")) == "reference":
        sys.exit("bench-gpu: sinkattn has no kernel for CUDA here (see `sinkattn info`): there is nothing to time")
    return torch.cuda.get_device_name()


def run(name: str, part: Part, out: Path, end: float, args: argparse.Namespace) -> int | None:
    """Run a part; returns its exit status, None if it exceeded its time limit."""
    record = f"{out}-{name}"
    remove(out, name)
    begin = time.time()
    until = min(end, begin + part.seconds)
    command = [sys.executable, "-m", "pytest", "-q", *(str(HERE / target) for target in part.targets)]
    command += ["--record", record, f"--benchmark-json={record}.json", "--until", str(until - SECONDS_TO_WRITE)]
    command += ["--rehearse"] * args.rehearse + (["-k", args.k] if args.k else [])
    # Its own process group, to kill its compiler processes too.
    process = subprocess.Popen(command, cwd=HERE.parent, preexec_fn=os.setpgrp)
    try:
        return process.wait(until - time.time())
    except subprocess.TimeoutExpired:
        print(f"bench-gpu: {name}: out of time", flush=True)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        print(f"bench-gpu: {name} took {time.time() - begin:.0f} s", flush=True)


def files(out: Path, name: str) -> list[Path]:
    """Files that a part writes: JSON of pytest-benchmark when it finishes, results after each benchmark, the report."""
    return [Path(f"{out}-{name}.{kind}") for kind in ("json", "jsonl", "txt")]


def remove(out: Path, name: str) -> None:
    for path in files(out, name):
        path.unlink(missing_ok=True)


def join(out: Path, names: Iterable[str]) -> None:
    """Join the files of the parts into one JSON and one text."""
    whole: dict[str, Any] = {"benchmarks": [], "unfinished": []}
    texts = []
    for name in names:
        finished, records, text = files(out, name)
        if finished.is_file() and finished.stat().st_size:
            content = json.loads(finished.read_text())
            whole = {**content, **whole, "benchmarks": whole["benchmarks"] + content["benchmarks"]}
        elif records.is_file():
            whole["unfinished"] += map(json.loads, records.read_text().splitlines())
        if text.is_file():
            texts.append(text.read_text())
        remove(out, name)
    out.with_name(f"{out.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    out.with_name(f"{out.name}.txt").write_text("\n\n".join(texts))


def main() -> None:
    args = parse_arguments()
    end = time.time() + 60 * args.minutes
    device = "rehearsal" if args.rehearse else check_device()
    if args.json is not None:
        out = args.json.with_suffix("") if args.json.suffix == ".json" else args.json
    else:
        slug = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
        folder = HERE.parent / "build" if args.rehearse else HERE / "results"
        out = folder / f"{slug}-{datetime.date.today()}"
    # When it is terminated it also kills the running part and keeps the results.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench-gpu: ended"))
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = REHEARSED if args.rehearse else {name: PARTS[name] for name in args.only or PARTS}
    try:
        results = {
            name: run(name, part, out, end, args)
            for name, part in parts.items()
            if time.time() < end - SECONDS_TO_WRITE
        }
    finally:
        join(out, parts)
    print(f"bench-gpu: {out}.json, {out}.txt")
    nothing_selected = 5  # by -k
    if failed := [name for name in parts if results.get(name) not in (0, nothing_selected)]:
        sys.exit(f"bench-gpu: failed or cut short: {', '.join(failed)}")


if __name__ == "__main__":
    main()
