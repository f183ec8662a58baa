"""An endless chat in the browser, for many visitors at once: each has a stream of one pool.

Any model with a chat template works. First `pip install gradio`, then:

    python examples/web_demo.py                                        # SmolLM2-135M-Instruct, fetched from the hub
    python examples/web_demo.py Qwen/Qwen2.5-0.5B-Instruct
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import sinkattn
from sinkattn.hf.chat.chat import Chat
from sinkattn.hf.load import load


class Visitors:
    def __init__(self, name: str, window: int) -> None:
        model, tokenizer = load(name)
        sinkattn.enable(model, num_sinks=0, window=window, headroom=window)
        # 16 are replied to at a time; those who read or think wait in the memory of the host.
        self.pool = sinkattn.StreamPool(model, 16, max_parked=1000, tokenizer=tokenizer, max_prefix=window // 4)
        self.chats = defaultdict[str, Chat](lambda: Chat(self.pool, window, max_reply=window // 4))  # by session

    def reply(self, session: str, message: str, history: list[dict[str, Any]]) -> Iterator[str]:
        """The reply as far as it is. The history has fewer turns after undo and retry, and none after clear."""
        chat, num_turns = self.chats[session], sum(each["role"] == "user" for each in history)
        if not num_turns:
            chat.reset()
        while chat.num_turns > num_turns:
            chat.undo()
        yield from accumulate(chat.say(message))


def main(argv: list[str] | None = None) -> None:
    import gradio as gr

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="MODEL", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--window", type=int, default=1020, help="tokens in sight besides the system prompt")
    visitors = Visitors(**vars(parser.parse_args(argv)))

    def respond(message: str, history: list[dict[str, Any]], request: gr.Request) -> Iterator[str]:
        yield from visitors.reply(request.session_hash, message, history)

    def leave(request: gr.Request) -> None:
        if chat := visitors.chats.pop(request.session_hash, None):
            chat.close()

    with gr.ChatInterface(respond, title="A chat without end", concurrency_limit=16) as demo:
        demo.unload(leave)
    demo.launch()


if __name__ == "__main__":
    main()
