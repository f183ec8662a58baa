"""A chat without end: the model sees the system prompt and the last messages, and every turn costs the same.

    python examples/endless_chat.py                                    # SmolLM2-135M-Instruct, fetched from the hub
    python examples/endless_chat.py Qwen/Qwen2.5-0.5B-Instruct --system "You are a cook."

Any model with a chat template works. Messages come from stdin, a line each; an empty line takes the last turn back.
`sinkattn chat` is the same with more commands.
"""

import argparse
import sys

import sinkattn
from sinkattn.hf.chat.chat import Chat
from sinkattn.hf.load import load


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--system", help="system prompt (default: that of the model)")
    parser.add_argument("--window", type=int, default=1020, help="tokens in sight besides the system prompt")
    parser.add_argument("--max-reply", type=int, default=256)
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    # The system prompt takes the place of the sinks; headroom is what an empty line can take back.
    sinkattn.enable(model, num_sinks=0, window=args.window, headroom=args.window)
    pool = sinkattn.StreamPool(model, max_streams=1, tokenizer=tokenizer, max_prefix=args.window // 4)
    sampling = sinkattn.SamplingParams.from_generation_config(model.generation_config)
    chat = Chat(pool, args.window, args.max_reply, system=args.system, sampling=sampling)

    for line in sys.stdin:
        if not line.strip():
            chat.undo()
            continue
        for piece in chat.say(line):
            print(piece, end="", flush=True)
        print(flush=True)
        print(f"[turn {chat.num_turns}, {chat.num_in_sight} of {chat.total} tokens in sight]", file=sys.stderr)


if __name__ == "__main__":
    main()
