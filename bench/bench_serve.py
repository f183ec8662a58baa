"""`sinkattn serve` beside `transformers serve`: the same model, chats and threads, on the CPU, in one run.

    python bench/bench_serve.py --sessions 8 --turn 0    # or: make bench-serve ARGS="..."
    python bench/bench_serve.py --show bench/results/serve-*.json

Each session is a chat with a history of about 2,000 tokens, which it sends whole with every request, as clients of
OpenAI's API do, for a greedy reply of a fixed number of tokens, in events. All sessions send at the same time. Measured
are requests per second, and the time to the first token and to the end of a reply, as the client sees them, of

* ``sinkattn serve``, whose window holds all of the history, so that all see the same; `--window` sets another one.
* ``transformers serve``, with and without ``--continuous-batching``.

The *first* turn has a history that no server has seen; *later* turns have one more message and reply each. Servers take
turns, round after round, in an order that changes. ``transformers serve`` keeps nothing from one request to the next,
so its first round of later turns is also its first turn. Replies are compared, and a wrong one ends the run.

Then, on ``sinkattn serve`` with its default window, the time to the first token late in a chat beside that in a second
turn: with the history sent each time, and in a session that is sent new messages alone. Late turns alternate with
second turns of new chats.

The model has random weights and the shape of SmolLM2-135M, unless `--model` is given. A copy of it that says words of
one token each (`serve_model.py`) is written to a temporary folder. Needs `sinkattn[serve,cli]`, httpx and openai.
Prints tables, and writes JSON after each part. On two idle cores each size takes up to ten minutes, and the late turns
five; 32 sessions take 16 GB.
"""

import argparse
import asyncio
import datetime
import json
import os
import shlex
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from serve_client import Chat, SessionChat, WrongAnswer
from serve_measure import Benchmark, Plan
from serve_model import write_model
from serve_process import ServerFailed
from serve_report import table

from sinkattn.evaluate.environment import machine, versions

# Rounding may turn a near tie of two tokens, from which on the replies differ. In bfloat16 near ties are many.
LEAST_EQUAL = {"float32": 0.75, "bfloat16": 0.0}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/bench_serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="NAME", help="folder, GGUF file or name on the hub, with a chat template")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each server (%(default)s)")
    parser.add_argument("--window", type=int, metavar="TOKENS", help="of sinkattn (default: the whole history)")
    parser.add_argument("--sessions", type=int, nargs="*", metavar="N", default=[1, 8, 32], help="(1 8 32)")
    parser.add_argument("--history", type=int, default=2000, metavar="TOKENS", help="in the first turn (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=16, metavar="N", help="of a reply (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of later turns (%(default)s)")
    parser.add_argument("--requests", type=int, default=8, metavar="N", help="or more in each round (%(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=9, metavar="N", help="of a size, for which rounds are left out (%(default)s)"
    )
    parser.add_argument("--turn", type=int, default=100, metavar="N", help="the late turn; 0: none (%(default)s)")
    parser.add_argument("--samples", type=int, default=40, metavar="N", help="of turns around it (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/serve-DATE.json")
    parser.add_argument(
        "--show", type=Path, nargs="+", metavar="FILE", help="print the tables of these, measure nothing"
    )
    args = parser.parse_args()
    for name in ("threads", "history", "new_tokens", "rounds", "requests", "minutes", "samples"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {getattr(args, name)}")
    if min(args.sessions, default=1) < 1:
        parser.error(f"--sessions: expected positive numbers, got {min(args.sessions)}")
    if args.turn and args.turn <= args.samples // 2:
        parser.error(f"--turn: expected more than {args.samples // 2}, half of --samples, got {args.turn}")
    return args


async def measure(args: argparse.Namespace, benchmark: Benchmark, content: dict[str, Any], out: Path) -> None:
    """Measure all parts; what there is so far is written after each."""
    for count in args.sessions:
        content["load"] += await benchmark.load(count)
        out.write_text(json.dumps(content) + "\n")
    for chat_type in (Chat, SessionChat) if args.turn else ():
        content["late"].append(await benchmark.late(chat_type, args.turn, args.samples))
        out.write_text(json.dumps(content) + "\n")


def joined(paths: list[Path]) -> dict[str, Any]:
    """What several runs have measured, as if the first one had."""
    first, *others = (json.loads(path.read_text()) for path in paths)
    for name in ("load", "late"):
        first[name] += [row for other in others for row in other[name]]
    return first


def main() -> None:
    args = parse_arguments()
    if args.show:
        print(table(joined(args.show)))
        return
    out = args.json or Path(__file__).parent / "results" / f"serve-{datetime.date.today()}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        threads=args.threads,
        window=args.window,
        history=args.history,
        new_tokens=args.new_tokens,
        rounds=args.rounds,
        requests=args.requests,
        seconds=60 * args.minutes,
        least_equal=LEAST_EQUAL[args.dtype],
    )
    content = {
        # With names of files instead of paths, which are those of one machine.
        "command": shlex.join(["python", "bench/bench_serve.py", *(Path(each).name for each in sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": {"model": Path(args.model).name if args.model else "random", "dtype": args.dtype, **asdict(plan)},
        "load": [],
        "late": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer, words = write_model(Path(folder), args.model, getattr(torch, args.dtype))
            asyncio.run(measure(args, Benchmark(plan, Path(folder), tokenizer, words), content, out))
        except (ServerFailed, ValueError, WrongAnswer) as error:
            sys.exit(f"bench_serve: {error}")
    print(table(content))
    print(f"\n{out}")


if __name__ == "__main__":
    main()
