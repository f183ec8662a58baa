"""sinkattn beside what one would take instead: the same weights, text and cache size, on the CPU, in one run.

    python bench/compare --model MODEL.gguf --text FILE      # or: make compare ARGS="..."
    python bench/compare --show bench/results/compare-DATE.json

Makes each peer's environment on the first run (a venv in the cache folder, with the pins in the .txt files here) and
each peer's weights from those of the GGUF file. Then every peer generates in turns, round after round, so that whatever
else the machine does slows all alike, and then predicts a text. Prints a table; a peer that cannot run is in it as
failed. Writes the figures as JSON, and each token's time and loss to a second file, FILE-tokens.json. With the
defaults, and a model of 135 M parameters on two idle cores, this takes about fifteen minutes.
"""

import argparse
import datetime
import json
import shlex
import sys
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path

from environments import HERE, python_of
from measure import Comparison, Plan
from peers import PEERS, Peer
from process import PeerProcess
from report import figures, table
from transformers import AutoConfig, AutoTokenizer
from weights import Weights

from sinkattn.evaluate.environment import machine, versions
from sinkattn.evaluate.text import StandardLibrary, TextError, TextFile, TokenStream

sys.path.append(str(HERE.parent))
import real_model

# llama.cpp takes no prompt as long as its context. Fewer than a turn's warm-up would hide its first shift.
FREE = 16
# llama.cpp rounds the context up to a multiple of this.
CACHE_STEP = 256
CACHE_DIR = real_model.place().parent / "compare"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, metavar="FILE", help="GGUF file of a Llama")
    parser.add_argument("--text", type=Path, metavar="FILE", help="default: Python's standard library")
    parser.add_argument(
        "--cache", type=int, default=1024, help=f"tokens in sight, {CACHE_STEP} times any (%(default)s)"
    )
    parser.add_argument("--sinks", type=int, default=4, help="sinks among them (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of every peer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="turns of every peer (%(default)s)")
    parser.add_argument("--turn", type=int, default=256, metavar="TOKENS", help="most tokens of a turn (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10, help="most seconds of a turn (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens of text that are predicted (%(default)s)")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these; * and ? are wildcards")
    parser.add_argument("--list", action="store_true", help="print the names of the peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: bench/results/compare-DATE.json")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of this JSON, measure nothing")
    parser.add_argument("--cache-dir", type=Path, metavar="FOLDER", default=CACHE_DIR, help="(%(default)s)")
    args = parser.parse_args()
    if args.show or args.list:
        return args
    if args.model is None:
        parser.error("--model: expected a GGUF file")
    if args.model.suffix != ".gguf" or not args.model.is_file() or args.model.open("rb").read(4) != b"GGUF":
        parser.error(f"--model: expected a GGUF file (.gguf), got {args.model}")
    if args.cache < CACHE_STEP or args.cache % CACHE_STEP:
        parser.error(f"--cache: expected a multiple of {CACHE_STEP}, got {args.cache}")
    if not 0 <= args.sinks < args.cache // 2:
        parser.error(f"--sinks: expected 0 to {args.cache // 2 - 1}, got {args.sinks}")
    for name in ("threads", "rounds", "turn", "seconds", "tokens"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected a positive number, got {getattr(args, name)}")
    return args


def choose(patterns: list[str] | None) -> list[Peer]:
    """The peers of these names; exits where a name fits none."""
    for pattern in patterns or []:
        if not any(fnmatch(peer.name, pattern) for peer in PEERS):
            sys.exit(f"bench/compare: --peers: {pattern!r} fits none of: {', '.join(peer.name for peer in PEERS)}")
    return [peer for peer in PEERS if patterns is None or any(fnmatch(peer.name, pattern) for pattern in patterns)]


def main() -> None:
    args = parse_arguments()
    if args.list:
        print(*(peer.name for peer in PEERS), sep="\n")
        return
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    chosen = choose(args.peers)
    out = args.json or HERE.parent / "results" / f"compare-{datetime.date.today()}.json"
    weights = Weights(args.model, args.cache_dir)
    folder = weights.path("folder")
    prompt = args.cache - FREE
    try:
        text = TextFile(args.text) if args.text else StandardLibrary()
        ids = list(islice(TokenStream(text, AutoTokenizer.from_pretrained(folder)), prompt + args.tokens))
    except TextError as error:
        sys.exit(f"bench/compare: {error}")
    config = AutoConfig.from_pretrained(folder)
    job = {
        "ids": ids,
        "prompt": prompt,
        "sinks": args.sinks,
        "cache": args.cache,
        "threads": args.threads,
        "kv_elements": 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
    }

    def start(peer: Peer) -> PeerProcess:
        python = python_of(peer.requirements, args.cache_dir)
        own = {"model": str(weights.path(peer.weights)), "dtype": peer.dtype, "options": peer.options}
        return PeerProcess(python, peer, {**job, **own}, args.cache_dir / f"{peer.name}.log")

    plan = Plan(args.rounds, args.turn, args.seconds, args.tokens)
    comparison = Comparison({peer: peer.bits or weights.bits() for peer in chosen}, start)
    comparison.run(plan)
    results = list(comparison.results.values())
    content = {
        # With names of files instead of paths, which are those of one machine.
        "command": shlex.join(["python", "bench/compare", *(Path(each).name for each in sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "model": args.model.name,
            "text": text.description,
            **{name: job[name] for name in ("prompt", "sinks", "cache", "threads")},
        },
        "plan": asdict(plan),
        "other_work_percent": comparison.other_work,
        "rows": figures(results),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    tokens = out.with_name(f"{out.stem}-tokens.json")
    tokens.write_text(json.dumps([asdict(result) for result in results]) + "\n")
    print(table(content))
    print(f"\n{out}, {tokens}")
    if all(result.error for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
