"""Time of a stream with drafts by prompt lookup, compared with none.

    python -m pytest bench/bench_speculation.py --benchmark-json=speculation.json

The small model that ships with the package, float32, 4 sinks and a window of 252, streams of 600 tokens, far past the
window. Tokens are compared first: they are the same. A text that repeats itself is the best case, one that is sampled
at a high temperature the worst, as nothing that is drafted comes.
"""

import pytest
import torch

import sinkattn
from sinkattn.hf.load import load

NUM_TOKENS, DRAFTS, ROUNDS = 600, 8, 9
PLAIN, LOOKUP = "no drafts", "prompt lookup"
TEXTS = {
    "repeats itself, greedy": {},
    "repeats itself, temperature 0.8": {"temperature": 0.8, "seed": 0},
    "temperature 1.2, hardly any draft right": {"temperature": 1.2, "seed": 0},
}
PROMPT = "for name in names:\n    print(name)\n" * 4


@pytest.mark.parametrize("text", TEXTS)
def test_prompt_lookup(bench, text: str) -> None:
    with torch.inference_mode(False), torch.no_grad():
        model, tokenizer = load(device="cpu")
        sinkattn.enable(model, headroom=2 * DRAFTS)
        sampling = sinkattn.SamplingParams(**TEXTS[text])
        pools = {
            PLAIN: sinkattn.StreamPool(model, 1, tokenizer=tokenizer),
            LOOKUP: sinkattn.StreamPool(
                model, 1, tokenizer=tokenizer, speculation=sinkattn.PromptLookup(num_tokens=DRAFTS)
            ),
        }
        num_forwards = 0

        def count(*_: object) -> None:
            nonlocal num_forwards
            num_forwards += 1

        def generated(pool: sinkattn.StreamPool) -> list[int]:
            with pool.open(sampling=sampling) as stream:
                stream.feed(PROMPT)
                return [*stream.generate(NUM_TOKENS)]

        want = generated(pools[PLAIN])
        hook = model.register_forward_hook(count)
        assert generated(pools[LOOKUP]) == want
        hook.remove()
        timings = bench.time_interleaved(
            {name: lambda pool=pool: lambda: generated(pool) for name, pool in pools.items()}, rounds=ROUNDS
        )
    figures = {"forwards/token": num_forwards / NUM_TOKENS, f"{LOOKUP} / {PLAIN}": timings.ratio(LOOKUP, PLAIN)}
    bench.add_row("A stream of 600 tokens, with drafts and without", text, {**timings.figures(), **figures})
