"""A chat predicted in several ways: losses are those of the unpatched model on what each token sees."""

import numpy as np
import pytest
import torch
from chat_models import CHATML, tiny_model, with_template

from sinkattn.evaluate.chat import Round
from sinkattn.evaluate.eviction import SYSTEM, Dialogue, Way, _segments, blocks, losses, ways
from sinkattn.hf.chat.encoder import MessageEncoder


@pytest.fixture(scope="module")
def chatty(tokenizer):
    return with_template(tokenizer, CHATML)


@pytest.fixture(scope="module")
def dialogue(chatty):
    def spoken(question, reply, ended):
        return Round(question, reply, 0, ended, True, None, [], 0)

    rounds = [
        spoken("What is it?", "It is a ring.", True),
        spoken("Why?", "Because", False),
        spoken("So?", "So it is.", True),
    ]
    return Dialogue.of(MessageEncoder(chatty, "Be brief."), rounds * 2)


def test_a_dialogue_is_the_chat_of_the_template(chatty, dialogue):
    text = chatty.decode(dialogue.ids)
    assert text.startswith(
        "<|begin|>system\nBe brief.<|end|>\n<|begin|>user\nWhat is it?<|end|>\n<|begin|>assistant\nIt is"
    )
    assert len(dialogue.ids) == len(dialogue.wanted)
    wanted = [number for number, is_wanted in zip(dialogue.ids, dialogue.wanted, strict=True) if is_wanted]
    assert chatty.decode(wanted) == "It is a ring.<|end|>BecauseSo it is.<|end|>" * 2
    starts = {unit: [chatty.decode(dialogue.ids[x : x + 3]) for x in dialogue.begins[unit]] for unit in dialogue.begins}
    assert starts["token"] == []
    assert len(starts["turn"]) == 6
    assert len(starts["message"]) == 12
    assert all(start.startswith("<|begin|>") for start in starts["message"])


@torch.no_grad()
def want(model, dialogue, way):
    """One forward for each token, over what it sees. The model has one layer, so nothing else has an effect."""
    ids, out = dialogue.ids, np.full(len(dialogue.ids), np.nan)
    begins = [] if way.unit == "token" else [way.num_sinks, *dialogue.begins[way.unit]]
    for token in range(1, len(ids)):
        if not dialogue.wanted[token]:
            continue
        last = token - 1
        first = max(way.num_sinks, last - way.window + 1)
        whole = [x for x in begins if first <= x <= last]
        if way.unit != "token" and first > way.num_sinks and whole:
            first = whole[0]
        seen = [*range(min(way.num_sinks, token)), *range(first, token)]
        logits = model(torch.tensor([[ids[x] for x in seen]])).logits[0, -1]
        out[token] = -logits.log_softmax(-1)[ids[token]]
    return out


def test_losses_are_those_of_the_unpatched_model_on_what_is_in_sight(chatty, dialogue):
    model = tiny_model(chatty, num_hidden_layers=1).double()
    found = {}
    for way in [*ways(dialogue.num_prefix, 50), Way(0, len(dialogue.ids), "token")]:
        found[way] = losses(model, dialogue, way)
        np.testing.assert_allclose(found[way], want(model, dialogue, way), rtol=1e-6, err_msg=str(way))
        assert (~np.isnan(found[way]) == dialogue.wanted).all()
    assert len({x.tobytes() for x in found.values()}) == 7, "every way sees something else"


def test_windows_move_before_a_question_as_in_a_chat(chatty, dialogue):
    encoder = MessageEncoder(chatty, "Be brief.")
    question, opening = len(encoder.question("What is it?")), len(encoder.before_reply)
    for way in ways(dialogue.num_prefix, 60):
        changes = [seen for seen, _, begin in _segments(dialogue, way) if begin]
        assert changes or way.unit == "token"
        for begin in dialogue.begins["turn"][::3]:
            assert not {*changes} & {*range(begin + 1, begin + question + opening)}


def test_losses_count_from_where_all_ways_forget(chatty, dialogue):
    values = losses(tiny_model(chatty), dialogue, Way(0, 60, "token"))
    mean = blocks(values, 60).mean()
    assert mean.tokens == sum(dialogue.wanted[60:])
    assert mean.loss == pytest.approx(np.nanmean(values[60:]))


def test_a_system_prompt_that_does_not_fit_is_refused():
    for num_prefix, total in ((4, 60), (60, 60)):
        with pytest.raises(
            ValueError, match=f"system: expected a prompt of more than 4 .* less than 60, got {num_prefix}"
        ):
            ways(num_prefix, total)
    assert [(x.num_sinks, x.window) for x in ways(20, 60)] == [(4, 56)] * 3 + [(20, 40)] * 3
    assert "Ada" in SYSTEM
