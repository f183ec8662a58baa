"""Evaluate a model of yours on a text of yours: does it have attention sinks, and what do they do for its perplexity?

    python examples/evaluate_model.py
    python examples/evaluate_model.py --model HuggingFaceTB/SmolLM2-135M --text book.txt --total 1024 --tokens 20000

This is the Python interface of `sinkattn eval sinks` and `sinkattn eval ppl`, which draw pictures and write JSON, too.
"""

import argparse
from pathlib import Path

from sinkattn.evaluate import perplexity, sinks
from sinkattn.evaluate.methods import CacheSize
from sinkattn.evaluate.text import StandardLibrary, TextFile, TokenStream
from sinkattn.hf.load import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a path (default: the small one that ships with sinkattn)")
    parser.add_argument("--text", type=Path, help="UTF-8 file (default: Python's standard library)")
    parser.add_argument("--total", type=int, default=128, help="tokens in sight: sinks and window")
    parser.add_argument("--tokens", type=int, default=5000, help="length of the stream")
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    stream = TokenStream(StandardLibrary() if args.text is None else TextFile(args.text), tokenizer)

    found = sinks.run(model, stream, args.total, args.tokens, on_progress=lambda name, done: None)
    print(f"{found.verdict} Recommended: {found.recommended} sinks.")

    caches = tuple(CacheSize(num_sinks, args.total - num_sinks) for num_sinks in (0, 4))
    settings = perplexity.Settings(caches, args.tokens, dense_tokens=0, recompute_every=50)
    result = perplexity.run(model, stream, settings, on_progress=lambda done, tracks: None)
    for track in result.tracks:
        # Recomputation is so slow that only every 50th token is scored; here all methods are compared at these.
        mean = track.sampled.mean()
        assert mean is not None
        print(f"{track.method.name:18}  perplexity {mean.perplexity:8.2f}  ({mean.tokens} tokens)")


if __name__ == "__main__":
    main()
