"""Read a live transcript from stdin, for ever, and say after each line what may come next: GPT-2 with top-k sampling.

    some_speech_recognizer | python examples/transcript.py
    python examples/transcript.py --model HuggingFaceTB/SmolLM2-135M --window 2000 < transcript.txt

What is said leaves no trace in what is read. GPT-2 has absolute positions, so it streams by re-encoding half of its
window from time to time; with any other model of the hub nothing here changes but the window.
"""

import argparse
import sys

import sinkattn
from sinkattn.hf.load import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2", help="name on the hub, or a path")
    parser.add_argument("--window", type=int, default=1020, help="most recent tokens in sight, besides 4 sinks")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--max-new-tokens", type=int, default=30)
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    sinkattn.enable(model, num_sinks=4, window=args.window)
    pool = sinkattn.StreamPool(model, max_streams=2, tokenizer=tokenizer)
    stream = pool.open(sampling=sinkattn.SamplingParams(temperature=0.8, top_k=args.top_k))
    for line in sys.stdin:
        stream.feed(line)
        with stream.fork() as guess:
            words = "".join(guess.generate_text(args.max_new_tokens)).split()
        print(f"{line.rstrip()}\n    ... {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
