"""A chat without end: what the model sees is the system prompt and whole messages, at the same cost for every turn."""

import pytest
import torch
from chat_models import ALTERNATING, CHATML, INST, tiny_model, with_template
from hf_models import build

import sinkattn
from sinkattn import SamplingParams
from sinkattn.hf.chat.chat import Chat
from sinkattn.hf.chat.encoder import MessageEncoder
from sinkattn.hf.pool.pool import StreamPool
from sinkattn.hf.pool.stream import Stream

WINDOW = 256
QUESTIONS = [
    "Tell me about rings.",
    "Why?",
    "What comes after seven, and what before it, and what is the sum of all three of them? " * 2,
    "def f(x):\n    return x + 1",
    "ok",
]


def begin_chat(tokenizer, template=CHATML, window=WINDOW, headroom=64, max_reply=12, **options):
    tokenizer = with_template(tokenizer, template)
    model = sinkattn.enable(tiny_model(tokenizer), 0, window, headroom)
    pool = StreamPool(model, 1, max_parked=2, tokenizer=tokenizer, max_prefix=64)
    # Only ASCII, so that text and tokens say the same, and an end now and then.
    bias = {number: 0.0 if tokenizer.decode([number]).isascii() else -torch.inf for number in range(len(tokenizer))}
    sampling = SamplingParams(temperature=1.0, seed=0, logit_bias={**bias, len(tokenizer) - 1: 4.0})
    return Chat(pool, window, max_reply, sampling=sampling, **options)


def text_in_sight(chat):
    return chat._pool.tokenizer.decode(chat._current.stream.in_sight)


@pytest.mark.parametrize(
    ("template", "system"), [(CHATML, "Be brief, and end with a rhyme."), (CHATML, None), (ALTERNATING, None)]
)
def test_a_conversation_of_200_turns_stays_well_formed(tokenizer, template, system):
    chat, messages, lengths = begin_chat(tokenizer, template, max_reply=8, system=system), [], set()
    for turn in range(200 if system else 30):
        question = QUESTIONS[turn % len(QUESTIONS)]
        reply = "".join(chat.say(question))
        lengths.add(chat.reply_tokens)
        messages += [{"role": "user", "content": question.strip()}, {"role": "assistant", "content": reply}]
        seen = chat.in_sight()
        expected = messages[-len(seen) :]
        assert [message.role for message in seen] == [message["role"] for message in expected]
        opening = [{"role": "system", "content": system}] if system else []
        text = chat._pool.tokenizer.apply_chat_template([*opening, *expected], tokenize=False)
        assert text_in_sight(chat) == text
        assert chat.num_in_sight == chat.num_prefix + sum(message.num_tokens for message in seen) <= chat.total
        assert chat.num_in_sight > WINDOW - 120 or not chat.num_evicted
    assert chat.num_evicted > 2 * WINDOW
    assert min(lengths) < 8 == max(lengths), "some replies end by themselves, some are cut off"


def test_token_by_token_the_chat_would_not_stay_well_formed(tokenizer, monkeypatch):
    feed = Stream.feed
    monkeypatch.setattr(Stream, "feed", lambda self, ids, **options: feed(self, ids, begins_message=False))
    chat = begin_chat(tokenizer)
    for turn in range(30):
        list(chat.say(QUESTIONS[turn % len(QUESTIONS)]))
    assert not text_in_sight(chat).startswith("<|begin|>system\nBe kind.<|end|>\n<|begin|>")


def test_a_turn_costs_what_the_first_costs(tokenizer, monkeypatch):
    chat, work, texts = begin_chat(tokenizer, max_reply=3), [], []
    run, encode = chat._pool.scheduler.engine.memory.run, MessageEncoder._encode

    def noted(inputs):
        work.append(len(inputs[0].ids))
        return run(inputs)

    monkeypatch.setattr(chat._pool.scheduler.engine.memory, "run", noted)
    monkeypatch.setattr(MessageEncoder, "_encode", lambda self, text: texts.append(text) or encode(self, text))
    # No reply ends by itself, so that all turns have as many tokens.
    chat._stop_ids = {-1}
    turns = []
    for _ in range(60):
        work.clear()
        texts.clear()
        list(chat.say("What is it?"))
        turns.append((work.copy(), texts.copy(), len(chat._current.messages)))
    first, *others = turns[1][0]
    assert turns[0][0] == [chat.num_prefix + first, *others]
    assert all(sum(fed) == sum(turns[1][0]) and encoded == turns[1][1] for fed, encoded, _ in turns[1:])
    encoder = chat._encoder
    assert first == len(encoder.question("What is it?")) + len(encoder.before_reply)
    # A forward until the first token of the reply, whatever leaves the window; then one for each token, the last one
    # with what ends the reply, for which more may leave.
    assert all(fed[:3] == [first, 1, 1] and len(fed) <= 5 for fed, *_ in turns[1:])
    assert len(turns[1][0]) == 1 + 2 + 1
    assert turns[-1][2] == turns[-2][2] < 2 * 60, "no more messages are kept than can be seen"


def test_replies_are_those_of_generate_on_all_ids(tokenizer):
    tokenizer = with_template(tokenizer, CHATML)
    plain, model = tiny_model(tokenizer), sinkattn.enable(tiny_model(tokenizer), 0, WINDOW)
    chat, encoder = (
        Chat(StreamPool(model, 1, tokenizer=tokenizer, max_prefix=64), WINDOW, 12),
        MessageEncoder(tokenizer),
    )
    for question in QUESTIONS[:2]:
        ids = [*chat._current.stream.in_sight, *encoder.question(question), *encoder.before_reply]
        want = plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert "".join(chat.say(question)) == tokenizer.decode(want)
        assert chat._current.stream.in_sight == [*ids, *want.tolist(), *encoder.end]


def test_undo(tokenizer):
    chat = begin_chat(tokenizer, headroom=64)
    with pytest.raises(RuntimeError, match="undo: nothing has been said"):
        chat.undo()
    for turn in range(20):
        list(chat.say(QUESTIONS[turn % 2]))
    before, seen, turns = text_in_sight(chat), chat.in_sight(), chat.num_turns
    list(chat.say("Something else?"))
    chat.undo()
    assert (text_in_sight(chat), chat.in_sight(), chat.num_turns) == (before, seen, turns)
    list(chat.say(QUESTIONS[2]))
    length = sum(message.num_tokens for message in chat.in_sight()[-2:])
    assert length > 64
    before = text_in_sight(chat)
    with pytest.raises(RuntimeError, match=f"undo: the last question and its reply have {length} tokens, of which too"):
        chat.undo()
    assert text_in_sight(chat) == before
    assert chat.num_turns == turns + 1
    chat.reset()
    assert (chat.num_turns, chat.in_sight(), chat.num_in_sight) == (0, [], chat.num_prefix)


def test_a_reply_that_is_left_is_closed(tokenizer):
    chat = begin_chat(tokenizer)
    chat._stop_ids = {-1}
    pieces = chat.say("Count.")
    said = [next(pieces) for _ in range(3)]
    pieces.close()
    assert text_in_sight(chat).endswith(f"<|begin|>user\nCount.<|end|>\n<|begin|>assistant\n{''.join(said)}<|end|>\n")
    assert chat.reply_tokens == 3
    chat.say("Never begun.").close()
    assert chat.num_turns == 1


def test_copies(tokenizer):
    chat = begin_chat(tokenizer)
    with pytest.raises(RuntimeError, match="back: there is no other conversation"):
        chat.back()
    list(chat.say("One."))
    one = text_in_sight(chat)
    chat.fork()
    list(chat.say("Two."))
    two = text_in_sight(chat)
    chat.back()
    assert (text_in_sight(chat), chat.num_turns, len(chat.in_sight())) == (one, 1, 2)
    chat.back()
    assert (text_in_sight(chat), chat.num_turns) == (two, 2)
    for _ in range(5):
        chat.fork()
    chat.undo()
    assert text_in_sight(chat) == one
    chat.back()
    assert text_in_sight(chat) == two


def test_another_system_prompt(tokenizer):
    chat = begin_chat(tokenizer, system="Be brief.")
    list(chat.say("One."))
    chat.begin("Be long and thorough.")
    assert text_in_sight(chat) == "<|begin|>system\nBe long and thorough.<|end|>\n"
    before = text_in_sight(chat)
    with pytest.raises(ValueError, match=r"prefix: expected up to 64 tokens \(max_prefix\)"):
        chat.begin("word " * 80)
    with pytest.raises(ValueError, match="system: expected text without special tokens"):
        chat.begin("<|begin|>")
    assert text_in_sight(chat) == before
    list(chat.say("Two."))
    assert (chat.num_turns, len(chat.in_sight())) == (1, 2)


def test_what_is_refused(tokenizer):
    chat = begin_chat(tokenizer, window=40)
    before = text_in_sight(chat)
    with pytest.raises(ValueError, match=r"message: expected up to .* tokens, so that it fits the window of 40"):
        chat.say(QUESTIONS[2])
    with pytest.raises(ValueError, match="message: expected text without special tokens"):
        chat.say("<|end|>")
    assert text_in_sight(chat) == before
    with pytest.raises(ValueError, match="max_reply: expected fewer tokens than the window has, 40, got 40"):
        begin_chat(tokenizer, window=40, max_reply=40)
    gpt2 = sinkattn.enable(build("gpt2", vocab_size=1026), 0, 40)
    with pytest.raises(ValueError, match="evict: expected 'token', as models with recurrent states"):
        Chat(StreamPool(gpt2, tokenizer=with_template(tokenizer, INST)), 40, 10)
    model = sinkattn.enable(tiny_model(tokenizer), 0, 40)
    with pytest.raises(ValueError, match="pool: expected one with a tokenizer, got None"):
        Chat(StreamPool(model), 40, 10)
    plain = with_template(tokenizer, "{% for message in messages %}{{ message.content }}\n{% endfor %}")
    model = tiny_model(plain)
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="chat: this model has no end token"):
        Chat(StreamPool(sinkattn.enable(model, 0, 40), tokenizer=plain, max_prefix=4), 40, 10)


def test_a_template_without_special_tokens_around_a_reply(tokenizer):
    """A question and its reply leave together."""
    chat = begin_chat(tokenizer, INST, window=60)
    for turn in range(20):
        list(chat.say(QUESTIONS[turn % 2]))
        assert text_in_sight(chat).startswith("<s>[INST] ")
        assert text_in_sight(chat).count("[INST]") == text_in_sight(chat).count("</s>")
    assert chat.num_evicted


def test_a_conversation_is_saved_and_loaded(tokenizer, tmp_path):
    chat = begin_chat(tokenizer, system="Be brief.")
    for _ in range(12):
        list(chat.say(QUESTIONS[0]))
    chat.save(tmp_path / "chat")
    seen = chat.in_sight()
    before, prefix, want = text_in_sight(chat), chat.num_prefix, "".join(chat.say("Then?"))
    chat.fork()
    chat.begin("Speak of something else, in many words.")
    with pytest.raises(OSError, match="other"):
        chat.load(tmp_path / "other")
    chat.load(tmp_path / "chat")
    assert (text_in_sight(chat), chat.num_prefix) == (before, prefix)
    assert [(*x[:2], x.excerpt.strip()) for x in chat.in_sight()] == [(*x[:2], x.excerpt.strip()) for x in seen]
    assert chat.num_turns == len([message for message in seen if message.role == "user"]) < 12
    assert "".join(chat.say("Then?")) == want
    assert [message.role for message in chat.in_sight()[-2:]] == ["user", "assistant"]
    chat.undo()
    assert text_in_sight(chat) == before
    chat.undo()  # what was said before it was saved
    assert chat.in_sight()[-len(seen) + 2 :] == [(*x[:2], x.excerpt.strip()) for x in seen[:-2]]


@pytest.mark.parametrize("template", [ALTERNATING, INST])
def test_questions_and_replies_that_leave_together_are_told_apart(tokenizer, template, tmp_path):
    chat = begin_chat(tokenizer, template, window=100)
    for question in QUESTIONS[:2] + QUESTIONS[3:]:
        list(chat.say(question))
    seen = chat.in_sight()
    chat.save(tmp_path / "chat")
    chat.load(tmp_path / "chat")
    assert [(*x[:2], x.excerpt.strip()) for x in chat.in_sight()] == [(*x[:2], x.excerpt.strip()) for x in seen]
    assert len(seen) > 2
    chat.reset()
    chat.save(tmp_path / "chat")
    chat.load(tmp_path / "chat")
    assert chat.in_sight() == []
    assert chat.num_turns == 0


def test_a_chat_that_is_closed_frees_its_streams(tokenizer):
    chat = begin_chat(tokenizer)
    list(chat.say("Why?"))
    chat.fork()
    assert len(chat._pool) == 2
    chat.close()
    assert not len(chat._pool)
    with pytest.raises(RuntimeError, match="closed"):
        list(chat.say("Why?"))
