"""Fine-tune a model while it serves: it answers requests, and a thread teaches it what it has read meanwhile.

    python examples/learn_while_serving.py < requests.txt
    python examples/learn_while_serving.py --model HuggingFaceTB/SmolLM2-135M --save adapters < requests.txt

Every line of stdin is a request, of which the model says how it goes on, and what it learns from. It learns adapters
(`pip install 'sinkattn[learn]'`), and takes over new ones between two tokens.
"""

import argparse
import sys

import sinkattn
from sinkattn.hf.load import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub, or a path (default: the small one that ships with sinkattn)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a step of the optimizer")
    parser.add_argument("--max-new-tokens", type=int, default=20)
    parser.add_argument("--save", metavar="DIR", help="folder for the adapters, which peft can load")
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    sinkattn.enable(model, num_sinks=4)
    with sinkattn.BackgroundLearner(model, chunk=args.chunk) as learner:
        for line in sys.stdin:
            inputs = tokenizer(line, return_tensors="pt").to(model.device)
            learner.feed(inputs.input_ids)  # returns at once, unless much is still unread
            text = model.generate(**inputs, max_new_tokens=args.max_new_tokens)
            answer = text[0, inputs.input_ids.shape[1] :]
            print(f"[{learner.statistics().updates_in_use} updates] {tokenizer.decode(answer)!r}", flush=True)
        learner.flush()  # learn from the rest
        losses = learner.statistics().losses  # nats per token, of each chunk before it was learned from
        if losses:
            print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} at last", file=sys.stderr)
        learner.swap()
        if args.save:
            learner.save(args.save)


if __name__ == "__main__":
    main()
