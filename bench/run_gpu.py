"""All GPU benchmarks, within ten minutes: JSON, and the report as text beside it.

    make bench-gpu                          # into bench/results/DEVICE-DATE.json and .txt
    make bench-gpu ARGS="--json FILE"
    make bench-gpu ARGS="--rehearse"        # tiny shapes on the CPU, to see that everything works

Each file runs in a process of its own, most important first, so that none takes the others down. A file that has used
up its time is ended, and what it had found by then is kept: in the JSON, below "unfinished".
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
from pathlib import Path
from typing import Any

import torch

from sinkattn import ops

HERE = Path(__file__).parent
# Most seconds that each may take: about twice what it should.
PARTS = {"attention": 300, "model": 180, "compiled": 240}
TO_WRITE = 10


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="run the GPU benchmarks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/DEVICE-DATE.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default: %(default)s)")
    parser.add_argument("--only", choices=PARTS, action="append", help="run this file alone; may be given again")
    parser.add_argument("-k", metavar="EXPRESSION", help="run some benchmarks only, as pytest has it")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, on tiny shapes")
    return parser.parse_args()


def check_device() -> str:
    """Name of the GPU; ends the program where there is nothing to time."""
    if not torch.cuda.is_available():
        sys.exit("bench-gpu: torch sees no CUDA device here; ARGS=--rehearse tries the benchmarks out on the CPU")
    if ops.select_backend(torch.device("cuda")) == "reference":
        sys.exit("bench-gpu: sinkattn has no kernel for CUDA here (see `sinkattn info`): there is nothing to time")
    return torch.cuda.get_device_name()


def run(part: str, out: Path, end: float, args: argparse.Namespace) -> int | None:
    """Exit status of a part; None if its time was up."""
    record = f"{out}-{part}"
    until = min(end, time.time() + PARTS[part])
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / f"gpu_{part}.py"), "--record", record]
    command += [f"--benchmark-json={record}.json", "--until", str(until - TO_WRITE)]
    command += ["--rehearse"] * args.rehearse + (["-k", args.k] if args.k else [])
    # In a group of its own, to be ended with all its compiler processes.
    process = subprocess.Popen(command, cwd=HERE.parent, preexec_fn=os.setpgrp)
    try:
        return process.wait(until - time.time())
    except subprocess.TimeoutExpired:
        print(f"bench-gpu: {part}: out of time", flush=True)
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def join(out: Path, parts: list[str]) -> None:
    """Make one JSON and one text of those of the parts."""
    whole: dict[str, Any] = {"benchmarks": [], "unfinished": []}
    texts = []
    for part in parts:
        finished, records, text = (Path(f"{out}-{part}.{kind}") for kind in ("json", "jsonl", "txt"))
        if finished.is_file() and finished.stat().st_size:
            content = json.loads(finished.read_text())
            whole = {**content, **whole, "benchmarks": whole["benchmarks"] + content["benchmarks"]}
        elif records.is_file():
            whole["unfinished"] += map(json.loads, records.read_text().splitlines())
        if text.is_file():
            texts.append(text.read_text())
        for path in (finished, records, text):
            path.unlink(missing_ok=True)
    out.with_name(f"{out.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    out.with_name(f"{out.name}.txt").write_text("\n\n".join(texts))


def main() -> None:
    args = arguments()
    end = time.time() + 60 * args.minutes
    name = "rehearsal" if args.rehearse else check_device()
    if args.json is not None:
        out = args.json.with_suffix("") if args.json.suffix == ".json" else args.json
    else:
        slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
        folder = HERE.parent / "build" if args.rehearse else HERE / "results"
        out = folder / f"{slug}-{datetime.date.today()}"
    # What is ended by others keeps what it found as well, and leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench-gpu: ended"))
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = args.only or list(PARTS)
    try:
        results = {part: run(part, out, end, args) for part in parts if time.time() < end - TO_WRITE}
    finally:
        join(out, parts)
    print(f"bench-gpu: {out}.json, {out}.txt")
    nothing_selected = 5  # by -k
    if failed := [part for part in parts if results.get(part) not in (0, nothing_selected)]:
        sys.exit(f"bench-gpu: failed or cut short: {', '.join(failed)}")


if __name__ == "__main__":
    main()
