"""64 endless streams at once in one pool: streams of any age share every forward, and each has memory of its own.

    python examples/many_streams.py
    python examples/many_streams.py --model HuggingFaceTB/SmolLM2-135M --streams 16 --tokens 1000

Each stream is a task of asyncio here; threads work as well, with `feed` and `generate_text`. A stream says what it
would say alone.
"""

import argparse
import asyncio
import time

import sinkattn
from sinkattn.hf.load import load

PROMPTS = ["import os\n", "class Ring:\n", "def test_window():\n", "# The oldest token\n", "for x in range(10):\n"]


async def tell(pool: sinkattn.StreamPool, number: int, tokens: int) -> str:
    """What a stream of its own says after a prompt; its memory is free for another one afterwards."""
    sampling = sinkattn.SamplingParams(temperature=0.7, top_k=50, seed=number)
    with pool.open(sampling=sampling) as stream:
        await stream.feed_async(PROMPTS[number % len(PROMPTS)])
        return "".join([piece async for piece in stream.generate_text_async(tokens)])


async def run(pool: sinkattn.StreamPool, streams: int, tokens: int) -> None:
    began = time.perf_counter()
    texts = await asyncio.gather(*(tell(pool, number, tokens) for number in range(streams)))
    seconds = time.perf_counter() - began
    for number, text in enumerate(texts):
        print(f"{number:3d}  {text[:100]!r}")
    memory = pool.nbytes / 2**20
    print(f"{streams} streams, {streams * tokens / seconds:.0f} tokens/s in all, {memory:.1f} MiB of keys and values")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a path (default: the small one that ships with sinkattn)")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=100, help="tokens that each stream generates")
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    sinkattn.enable(model, num_sinks=4)
    with sinkattn.StreamPool(model, max_streams=args.streams, tokenizer=tokenizer) as pool:
        asyncio.run(run(pool, args.streams, args.tokens))


if __name__ == "__main__":
    main()
