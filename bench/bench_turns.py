"""Time to the first token of a turn of a chat: late, early, and with all that is in sight sent again.

    python -m pytest bench/bench_turns.py --benchmark-json=turns.json

Llamas of random parameters, with a system prompt of 39 tokens and a window of 1,020, of which whole messages leave:
``116 M``, a model of 30 narrow layers, and two layers of the width of Llama 3.2 1B. A turn is one of `sinkattn serve`,
without HTTP: a question, which is encoded, and the first token of the reply. All turns have the same 26 new tokens,
those of the template among them, and a reply of 39; what the reply ends with has run before the next question, as it
has where somebody reads the reply.

* ``turn 2``: of a chat that has had one turn.
* ``turn 100``, ``turn 200``: and the turns after it; the window is full.
* ``sent again``: a new chat with the messages that are in sight in turn 200, and the question.

The first three have one forward until that token. What a late one costs more is attention over a full window, which
is less beside the weights the wider a model is.
"""

from collections.abc import Callable

import pytest
import torch
from bench_generate import CONFIG
from transformers import LlamaConfig, LlamaForCausalLM

import sinkattn
from sinkattn.hf.chat.encoder import MessageEncoder
from sinkattn.hf.load import load
from sinkattn.serve.conversation import ChatOpener, Conversation, Message

CONFIGS = {
    "116 M": CONFIG,
    "1 B, two layers": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 8192,
    },
}
PREFIX, WINDOW, LATE, ROUNDS = 40, 1020, (100, 200), 25
SYSTEM = "You are the cook of a small ship, and answer in two short sentences."
QUESTION = Message("user", "What is a roux good for?")
REPLY = Message("assistant", "It is flour that was cooked in butter, and it makes a sauce thick. It is good.")
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class Chat:
    """Turns of a chat."""

    def __init__(self, pool: sinkattn.StreamPool, opener: ChatOpener) -> None:
        self._pool, self._opener = pool, opener
        self._conversation: Conversation | None = None
        self._is_asked = False

    def ask(self, before: tuple[Message, ...] = ()) -> None:
        """A question, after others if the chat begins, and the first token of the reply."""
        if self._conversation is None:
            self._conversation = self._opener.open(self._pool, [*before, QUESTION])
        else:
            self._conversation.add([QUESTION])
        self._conversation.begin_reply()
        assert len([*self._conversation.stream.generate(1)]) == 1
        self._is_asked = True

    def end_reply(self) -> None:
        """The rest of the reply, if a question was asked."""
        if self._is_asked and self._conversation is not None:
            stream, rest = self._conversation.stream, self._opener.encoder.reply(REPLY.text)[1:]
            stream.feed(rest, begins_message=False, wait=False)
            self._conversation.end_reply(REPLY.text)
            stream.catch_up()
            self._is_asked = False

    def turn(self) -> None:
        self.ask()
        self.end_reply()

    def fork(self) -> "Chat":
        assert self._conversation is not None
        fork = Chat(self._pool, self._opener)
        fork._conversation = self._conversation.fork()
        return fork

    def forget(self) -> None:
        if self._conversation is not None:
            self._conversation.stream.close()
        self._conversation, self._is_asked = None, False

    def in_sight(self) -> tuple[Message, ...]:
        """The messages in sight after a whole turn."""
        assert self._conversation is not None
        parts = [part for part in self._conversation.in_sight() if part["role"] != "system"]
        return tuple(QUESTION if part["role"] == "user" else REPLY for part in parts)

    @property
    def num_in_sight(self) -> int:
        return 0 if self._conversation is None else len(self._conversation.stream.in_sight)

    def next_turn(self) -> Callable[[], None]:
        self.end_reply()
        return self.ask

    def next_second_turn(self) -> Callable[[], None]:
        self.forget()
        self.turn()
        return self.ask

    def next_sent_again(self, late: "Chat") -> Callable[[], None]:
        self.forget()
        late.end_reply()
        before = late.in_sight()
        return lambda: self.ask(before)


@pytest.mark.parametrize("name", CONFIGS)
def test_first_token(bench, name) -> None:
    torch.manual_seed(0)
    tokenizer = load()[1]
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    with torch.inference_mode(False), torch.no_grad():
        model = sinkattn.enable(LlamaForCausalLM(LlamaConfig(**CONFIGS[name])).eval(), 4, WINDOW)
        pool = sinkattn.StreamPool(model, 2 + len(LATE), tokenizer=tokenizer, max_prefix=PREFIX)
        opener = ChatOpener(SYSTEM, MessageEncoder(tokenizer, SYSTEM), WINDOW)
        early, again, chat = (Chat(pool, opener) for _ in range(3))
        late, turns = dict[str, Chat](), 0
        for number in LATE:
            while turns < number - 2:
                chat.turn()
                turns += 1
            late[f"turn {number}"] = fork = chat.fork()
            fork.turn()  # which gives it a row
        chat.forget()
        latest = [*late][-1]
        last = late[latest]
        assert last.num_in_sight > WINDOW - 100
        timings = bench.time_interleaved(
            {
                **{turn: each.next_turn for turn, each in late.items()},
                "turn 2": early.next_second_turn,
                "sent again": lambda: again.next_sent_again(last),
            },
            rounds=ROUNDS,
        )
        assert again.num_in_sight > WINDOW - 100
    ratios = {f"{turn} / turn 2": timings.ratio(turn, "turn 2") for turn in late}
    again_ratio = timings.ratio("sent again", latest)
    figures = timings.figures("turn 2", *late, "sent again")
    bench.add_row(
        "Time to the first token of a turn, fp32", name, {**figures, **ratios, f"sent again / {latest}": again_ratio}
    )
    for ratio, value in ratios.items():
        bench.add_target(f"{ratio} at most 1.10", name, value, value <= 1.1)
    bench.add_target(f"sent again / {latest} at least 5", name, again_ratio, again_ratio >= 5)
