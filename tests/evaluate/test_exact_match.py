"""Right answers: those that greedy generation gives, for any tokenizer."""

import copy
import re
from itertools import islice

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sinkattn
from sinkattn.evaluate import exact_match
from sinkattn.evaluate.exact_match import Tally, encode
from sinkattn.evaluate.items import Item, code_items, line_items
from sinkattn.evaluate.methods import CacheSize, Dense, OneShot, Recomputed, Scores, Streamed
from sinkattn.evaluate.text import StandardLibrary
from sinkattn.hf.chat.template import ChatTemplate


def test_tokens_of_an_answer_are_those_that_spell_it(tokenizer):
    for item in islice(line_items(2, 3), 20):
        ids, is_answer = encode(item, tokenizer)
        assert tokenizer.decode(ids) == item.context + item.answer + item.closing
        assert tokenizer.decode(ids[is_answer]).strip() == item.answer


def greedy_answers(model, tokenizer, items, size):
    """What `generate` answers, each question asked on the stream with all right answers before it."""
    sinkattn.enable(model, size.num_sinks, size.window)
    try:
        stream, right = [tokenizer.bos_token_id], []
        for item in items:
            ids, is_answer = encode(item, tokenizer)
            begin = int(is_answer.nonzero()[0])
            length = int(is_answer.sum())
            fed = torch.tensor([[*stream, *ids[:begin].tolist()]])
            made = model.generate(fed, max_new_tokens=length, do_sample=False)[0, fed.shape[1] :]
            right.append(torch.equal(made, ids[is_answer]))
            stream += ids.tolist()
        return right
    finally:
        sinkattn.disable(model)


@pytest.mark.parametrize("kind", ["lines", "code"])
@pytest.mark.parametrize("size", [CacheSize(4, 60), CacheSize(0, 40)], ids=str)
def test_right_answers_are_those_of_greedy_generation(kind, size, model, tokenizer):
    items = list(islice(line_items(2, 2) if kind == "lines" else code_items(StandardLibrary().pieces()), 16))
    seen = []
    [tally], _ = exact_match.run(
        [Streamed(model, size)], items, tokenizer, 16, lambda done, tokens, tallies: seen.append(sum(tallies[0].right))
    )
    right = [bool(after - before) for before, after in zip([0, *seen], seen, strict=False)]
    assert right == greedy_answers(model, tokenizer, items, size)
    assert 0 < sum(right) == sum(tally.right)


def test_lines_are_known_inside_the_window_and_beyond_it_not(model, tokenizer):
    size = CacheSize(4, 60)
    predictors = [Streamed(model, size), Recomputed(model, 64, 0), Dense(model)]
    accuracies = {}
    for distance in (1, 15):
        tallies, tokens = exact_match.run(
            predictors[: 3 if distance == 1 else 2], line_items(distance, 5), tokenizer, 60, lambda *progress: None
        )
        accuracies[distance] = [tally.accuracy for tally in tallies]
    assert tokens > 2000
    assert min(accuracies[1][:2]) > 0.7
    assert max(accuracies[15]) < 0.05


def test_one_shot_knows_nothing_of_the_questions_before(model, tokenizer):
    [tally], _ = exact_match.run([OneShot(model, [0])], line_items(1, 2), tokenizer, 20, lambda *progress: None)
    assert tally.accuracy > 0.7
    # The line asked for stands in the item before.
    [tally], _ = exact_match.run([OneShot(model, [0])], line_items(3, 2), tokenizer, 20, lambda *progress: None)
    assert tally.accuracy < 0.2


class Recording:
    """A predictor that only keeps what it is fed, and what it is asked for."""

    def reset(self):
        self.ids, self.wanted = [], []

    def feed(self, ids, targets, wanted):
        assert ids[1:].equal(targets[:-1])
        self.ids += ids.tolist()
        self.wanted += targets[wanted].tolist()
        return Scores(torch.zeros(len(ids)), torch.zeros(len(ids), dtype=torch.bool))


TEMPLATE = (
    "<s>Be brief.\n{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_items_of_a_chat_are_the_chat_that_the_template_writes(chat_tokenizer):
    items = list(islice(line_items(2, 3), 5))
    messages = []
    for item in items:
        messages += [{"role": "user", "content": item.question}, {"role": "assistant", "content": item.reply}]
    text = chat_tokenizer.apply_chat_template(messages, tokenize=False)
    recording = Recording()
    _, tokens = exact_match.run(
        [recording], items, chat_tokenizer, 5, lambda *progress: None, ChatTemplate.of(chat_tokenizer)
    )
    whole = chat_tokenizer(text, add_special_tokens=False).input_ids
    assert recording.ids == whole[:-1]
    assert tokens == len(whole)
    assert chat_tokenizer.decode(recording.wanted) == "".join(item.reply for item in items)
    for item in items:
        name, value = re.fullmatch(r"line (\w+) (\d+)", item.reply).groups()
        assert f"line {name} {value}\n" in "".join(each.question for each in items)
        assert item.question.endswith(f'Please repeat the line that begins with "line {name}".')


def test_one_question_at_a_time_begins_as_the_chat_does(model, chat_tokenizer):
    template = ChatTemplate.of(chat_tokenizer)
    start = exact_match.start_ids(chat_tokenizer, template)
    assert chat_tokenizer.decode(start) == "<s>Be brief.\n"
    item = next(line_items(1, 2))
    ids, is_answer = encode(item, chat_tokenizer, template)
    scores = OneShot(model, start).feed(torch.tensor([7, *ids[:-1].tolist()]), ids, is_answer)
    whole = torch.tensor([*start, *ids.tolist()])
    with torch.no_grad():
        logits = model(whole[None, :-1]).logits[0]
    expected = (logits.argmax(dim=-1) == whole[1:])[len(start) - 1 :]
    assert torch.equal(scores.hits, expected)


def test_tally_by_quarters():
    tally = Tally(8)
    for number in range(8):
        tally.add(number, number in (0, 1, 2, 7))
    facts = tally.as_dict()
    assert facts["accuracy_by_quarter"] == [1.0, 0.5, 0.0, 0.5]
    two = Tally(2)
    two.add(0, True)
    two.add(1, False)
    assert two.as_dict()["accuracy_by_quarter"] == [1.0, None, 0.0, None]
    assert (facts["questions"], facts["accuracy"]) == (8, 0.5)
    # Wilson's interval for 4 of 8.
    assert (facts["low"], facts["high"]) == pytest.approx((0.215, 0.785), abs=5e-4)
    assert Tally(3).accuracy == 0.0


def test_a_stream_without_start_token_begins_with_a_line_break(tokenizer):
    class Bare:
        bos_token_id = None

        def __call__(self, *args, **kwargs):
            return tokenizer(*args, **kwargs)

    assert exact_match.first_token(Bare()) == tokenizer("\n", add_special_tokens=False).input_ids[-1]
    assert exact_match.first_token(tokenizer) == tokenizer.bos_token_id
    assert encode(Item("a ", "b", "\n", "a", "b"), tokenizer)[1].any()


def test_what_looks_like_a_special_token_is_text(tokenizer):
    ids, _ = encode(Item("<s> a ", "b", "\n", "a", "b"), tokenizer)
    assert tokenizer.bos_token_id not in ids


def test_answers_that_a_tokenizer_cannot_spell_are_refused():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    for answer in ("b", " "):
        with pytest.raises(ValueError, match="questions: this tokenizer cannot spell the answer"):
            encode(Item("a ", answer, "\n", "a", "b"), words)
    with pytest.raises(ValueError, match="tokenizer: has neither a start token nor a line break"):
        exact_match.first_token(words)
