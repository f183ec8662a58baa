"""Whether a Llama streams as a plain PyTorch model in fp64 says, at sampled tokens far behind its cache.

    python bench/real_agreement.py --model MODEL --text FILE --cache 4+252 --tokens 20000 --json OUT.json

The plain model (tests/evaluate/naive.py) reads the same ids from the first on. For every token and layer it gathers all
visible keys and rotates them to their ranks; it has no cache, no ring and no kernel. What is compared is the
log-probability, in nats, that both give to the token that comes next. Exits with 1 if they differ by more than 2e-3.
"""

import argparse
import copy
import json
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from sinkattn.evaluate.environment import machine, versions
from sinkattn.evaluate.methods import CacheSize, Streamed
from sinkattn.evaluate.recorder import sample_positions
from sinkattn.evaluate.text import TextFile, TokenStream
from sinkattn.hf.load import load

sys.path.append(str(Path(__file__).parents[1] / "tests" / "evaluate"))
import naive

ALLOWED = 2e-3


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compare a streamed Llama with a plain PyTorch model in fp64")
    parser.add_argument("--model", required=True, help="a Llama: anything that sinkattn's commands take")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE")
    parser.add_argument("--cache", type=CacheSize.parse, required=True, metavar="S+W", help="sinks + window")
    parser.add_argument("--tokens", type=int, default=20_000, help="length of the stream (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=400, help="tokens of its second half (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    model, tokenizer = load(args.model, device="cpu", dtype="float32")
    stream = TokenStream(TextFile(args.text), tokenizer)
    ids = torch.tensor(list(islice(stream, args.tokens + 1)))
    at = sample_positions(args.tokens // 2, args.tokens, args.samples, np.random.default_rng(0))

    began = time.perf_counter()
    wanted = torch.ones(args.tokens, dtype=torch.bool)
    streamed = Streamed(model, args.cache).feed(ids[:-1], ids[1:], wanted).losses[at]
    print(f"streamed {args.tokens:,} tokens in {time.perf_counter() - began:.0f} s; now the plain model", flush=True)
    began = time.perf_counter()
    plain = naive.losses(
        copy.deepcopy(model).double(), ids, args.cache.num_sinks, args.cache.window, torch.from_numpy(at)
    )
    difference = (streamed - plain).abs()
    report = {
        "model": args.model,
        "text": {"description": stream.text.description, "started_over": stream.restarts},
        "versions": versions(),
        "machine": machine(),
        "cache": str(args.cache),
        "tokens": args.tokens,
        "seconds_of_plain": time.perf_counter() - began,
        "samples": len(at),
        "first_sample": int(at[0]),
        "last_sample": int(at[-1]),
        "largest_difference": float(difference.max()),
        "median_difference": float(difference.median()),
        "allowed": ALLOWED,
        "positions": at.tolist(),
        "streamed": streamed.tolist(),
        "plain": plain.tolist(),
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    agrees = report["largest_difference"] < ALLOWED
    print(
        f"{len(at)} tokens from {at[0]:,} to {at[-1]:,}, cache of {args.cache}: log-probabilities differ by "
        f"{difference.median():.1e} nats at the median and {difference.max():.1e} at most; "
        f"{'below' if agrees else 'NOT below'} {ALLOWED:g}"
    )
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
