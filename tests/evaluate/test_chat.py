"""A chat in one stream: the rounds that `generate` gives, and counts that notice what is wrong."""

import pytest
import torch

import sinkattn
from sinkattn.evaluate.chat import converse, everyday_questions, repeated_share, summary
from sinkattn.evaluate.methods import CacheSize, Streamed
from sinkattn.hf.load import load

GREEDY = sinkattn.SamplingParams()
SIZE = CacheSize(4, 28)


@pytest.fixture
def chatty(chat_model):
    return load(chat_model, device="cpu")


def test_a_chat_is_that_of_generate_on_all_ids(chatty):
    model, tokenizer = chatty
    questions = ["import os", "def f(x):", "x = [1, 2, 3]", "for name in names:", "class A:", "return self"]
    rounds = list(converse(Streamed(model, SIZE), tokenizer, questions, 3, GREEDY))
    [end] = tokenizer("\n", add_special_tokens=False).input_ids
    sinkattn.enable(model, SIZE.num_sinks, SIZE.window)
    ids = []
    for question, each in zip(questions, rounds, strict=True):
        ids += tokenizer(f"<s>{question}\n", add_special_tokens=False).input_ids
        made = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, len(ids) :].tolist()
        reply = [token for token in made if token != end]
        assert each.ended == (end in made)
        assert (each.reply, each.tokens) == (tokenizer.decode(reply), len(reply))
        assert each.well_formed
        assert len(each.seconds) == max(0, len(reply) - 1)
        ids += [*reply, end]
    assert len(ids) > SIZE.total + 8, "the ring has wrapped"
    assert {each.ended for each in rounds} == {True, False}
    counts = summary(rounds, 6)
    assert (counts["rounds"], counts["well_formed"]) == (6, 6)
    assert counts["ended"] == sum(each.ended for each in rounds)
    assert counts["reply_tokens_by_quarter"][0] == sum(each.tokens for each in rounds[:2]) / 2
    assert counts["kv_bytes"][0] == counts["kv_bytes"][1] > 0
    # Of a chat that was ended early the later quarters are empty.
    assert summary(rounds, 24)["reply_tokens_by_quarter"] == [sum(each.tokens for each in rounds) / 6, None, None, None]


def test_a_special_token_within_a_reply_is_noticed(chatty):
    model, tokenizer = chatty
    with torch.no_grad():  # the template's token becomes as likely as the most common one
        model.lm_head.weight[tokenizer.bos_token_id] = model.lm_head.weight[model.generation_config.eos_token_id]
    sampling = sinkattn.SamplingParams(temperature=1.0, seed=0)
    rounds = list(converse(Streamed(model, SIZE), tokenizer, ["import os"] * 12, 12, sampling))
    assert 0 < summary(rounds, 12)["well_formed"] < 12
    for each in rounds:
        assert each.well_formed == ("<s>" not in each.reply)


def test_a_model_that_cannot_chat_is_refused(chatty, tokenizer):
    model, with_template = chatty
    with pytest.raises(ValueError, match="chat: this model's tokenizer has no chat template"):
        list(converse(Streamed(model, SIZE), tokenizer, ["a"], 5, GREEDY))
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="chat: this model has no end token"):
        list(converse(Streamed(model, SIZE), with_template, ["a"], 5, GREEDY))


def test_repetition():
    assert repeated_share([1, 2, 3]) is None
    assert repeated_share([1, 2, 3, 4, 5]) == 0
    assert repeated_share([7] * 13) == 0.9
    assert repeated_share([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def test_everyday_questions_are_a_hundred_different_ones():
    assert len(set(everyday_questions())) == 100
    assert everyday_questions() == everyday_questions()
