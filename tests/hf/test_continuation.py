"""`generate` that continues streams: every turn gives the logits of a new stream that is fed all tokens.

Conversations that are tokenized again and differ from what was fed, edited prompts, embeddings, pictures.
"""

import copy
import pickle
import warnings

import families
import pytest
import torch
from continued import FAMILIES, GREEDY, PICTURES, enabled, fresh, llava
from hf_models import random_ids
from test_generate import S
from transformers import TextStreamer

import sinkattn
from sinkattn.hf.versions import forward_cache


def tokenized_again(reply: torch.Tensor, how: str) -> torch.Tensor:
    other = random_ids(len(reply), 2, seed=9)
    return {
        "same": reply,
        "dropped": reply[:, 3:],
        "one more": torch.cat((reply[:, :2], other[:, :1], reply[:, 2:]), dim=1),
        "others": torch.cat((reply[:, :2], other, reply[:, 4:]), dim=1),
        "the last": torch.cat((reply[:, :-2], other), dim=1),
        "cut short": reply[:, :4],
    }[how]


@pytest.mark.parametrize("how", ["same", "dropped", "one more", "others", "the last", "cut short"])
@pytest.mark.parametrize(
    ("prompt", "headroom"), [(5, 0), (17, 0), (150, 0), (150, 12)], ids=["short", "fits", "evicted", "headroom"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_encoded_anew(family, prompt, headroom, how, count_fed):
    model = enabled(family, headroom)
    fed = count_fed(model)
    cache, first, new = sinkattn.SinkCache(model), random_ids(2, prompt), random_ids(2, 15, seed=6)
    reply = model.generate(first, cache=cache, max_new_tokens=10, **GREEDY).sequences[:, prompt:]
    same = {"same": 9, "dropped": 0, "one more": 2, "others": 2, "the last": 8, "cut short": 4}[how]
    for turn, after in enumerate((new, new[:, :0])):
        whole = torch.cat((first, tokenized_again(reply, how), after), dim=1)
        if turn == 1 and how != "cut short":
            break  # no new ids to feed
        fed.take()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fork = copy.deepcopy(cache)
            output = model.generate(
                whole, cache=fork, attention_mask=torch.ones_like(whole), max_new_tokens=5, **GREEDY
            )
        torch.testing.assert_close(output.logits[0], fresh(model, whole), rtol=1e-4, atol=1e-4)
        assert fork.get_seq_length() == whole.shape[1] + 4
        assert fork.seen.tolist() == [whole.shape[1] + 4] * 2
        if family == "llama":  # re-encoding can roll back further without headroom
            prefilled_again = prompt == 150 and headroom == 0 and how != "same"
            kept = 0 if prefilled_again else min(prompt + same, whole.shape[1] - 1)
            assert fed.take() - fresh_tokens(whole) == whole.shape[1] - kept + 4
            messages = [str(each.message) for each in caught if "prefilled again" in str(each.message)]
            assert bool(messages) == prefilled_again
            if prefilled_again:
                assert f"headroom={9 - same + turn}) would avoid this" in messages[0]


def fresh_tokens(whole: torch.Tensor) -> int:
    """Tokens per row that `fresh` feeds."""
    return whole.shape[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_whose_end_the_template_drops(family):
    """Chat templates of reasoning models end the prompt with tokens that they drop once the reply is there."""
    model = enabled(family)
    cache, first, new = sinkattn.SinkCache(model), random_ids(1, 18), random_ids(1, 9, seed=6)
    reply = model.generate(first, cache=cache, max_new_tokens=4, **GREEDY).sequences[:, 18:]
    whole = torch.cat((first[:, :-2], reply[:, 2:], new), dim=1)
    output = model.generate(whole, cache=cache, max_new_tokens=4, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_ids_may_begin_as_the_stream_did(family):
    """A prefix that a chat template puts before each message does not make new ids the whole conversation."""
    model = enabled(family)
    for prompt, common in ((20, 6), (40, 15), (5, 2), (15, 8), (3, 2), (2, 2), (1, 1)):
        cache, first = sinkattn.SinkCache(model), random_ids(1, prompt)
        reply = model.generate(first, cache=cache, max_new_tokens=4, **GREEDY).sequences[:, prompt:]
        new = torch.cat((first[:, :common], random_ids(1, prompt - common, seed=7)), dim=1)
        feed = {forward_cache(model): cache}
        with torch.no_grad():
            model(reply[:, -1:], **feed)
        output = model.generate(new, cache=cache, max_new_tokens=3, **GREEDY)
        want = fresh(model, torch.cat((first, reply, new), dim=1))
        torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_that_may_mean_either_are_refused(family):
    model = enabled(family)
    cache, first = sinkattn.SinkCache(model), random_ids(2, 40)
    text = model.generate(first, cache=cache, max_new_tokens=30, do_sample=False)
    edited = random_ids(2, 90, seed=4)
    edited[0, :18], edited[1, :20] = first[0, :18], first[1, :20]
    differs = rf"token 18 of row 0 is {edited[0, 18]}, but in the stream it is {first[0, 18]}; to append these ids"
    for wrong, message in ((edited, differs), (first, "row 0 repeats the first 40 tokens of the stream")):
        with pytest.raises(ValueError, match=rf"input_ids: expected only new ids, .*\(69 tokens\) and more; {message}"):
            model.generate(wrong, cache=cache, max_new_tokens=5)
    mixed = torch.cat((text, random_ids(2, 9, seed=5)), dim=1)
    mixed[1] = random_ids(1, mixed.shape[1], seed=6)
    with pytest.raises(ValueError, match=r"token 0 of row 1 is \d+, but in the stream it is"):
        model.generate(mixed, cache=cache, max_new_tokens=5)
    assert cache.get_seq_length() == 69
    # As the message says: append them.
    again = torch.ones(2, 69 + 40, dtype=torch.int64)
    output = model.generate(first, cache=copy.deepcopy(cache), attention_mask=again, max_new_tokens=2, **GREEDY)
    want = fresh(model, torch.cat((text[:, :-1], first), dim=1))
    torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
    # Or replace the stream.
    cache.reset()
    output = model.generate(edited, cache=cache, max_new_tokens=2, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, edited), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_cache_remembers_no_ids(family):
    model = enabled(family)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 40)
    model.generate(ids, cache=cache, max_new_tokens=5, do_sample=False)
    assert cache.state.history.recent_ids is not None
    cache.reset()
    assert cache.state.history.recent_ids is None
    assert cache.state.history.prefix_ids is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_remembers_its_ids(family, copied):
    model = enabled(family)
    cache = sinkattn.SinkCache(model)
    text = model.generate(random_ids(1, 40), cache=cache, max_new_tokens=5, do_sample=False)
    whole = torch.cat((text[:, :-2], random_ids(1, 9, seed=3)), dim=1)
    output = model.generate(whole, cache=copied(cache), max_new_tokens=3, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", ["ids", "embeddings"])
def test_embeddings_are_new_tokens(first):
    model = enabled("llama")
    embed = model.get_input_embeddings()
    cache, ids, text = sinkattn.SinkCache(model), random_ids(1, 40), random_ids(1, 40)
    given = {"inputs": ids} if first == "ids" else {"inputs_embeds": embed(ids).detach()}
    with torch.no_grad():
        for turn in range(3):
            output = model.generate(cache=cache, max_new_tokens=8, **given, **GREEDY)
            torch.testing.assert_close(output.logits[0], fresh(model, text), rtol=1e-4, atol=1e-4)
            reply = output.sequences[:, -8:]
            new = random_ids(1, 6, seed=turn)
            text = torch.cat((text, reply, new), dim=1)
            given = {"inputs_embeds": embed(torch.cat((reply[:, -1:], new), dim=1)).detach()}
        model(inputs_embeds=given["inputs_embeds"], cache=cache)
    if first == "ids":
        # The ids of embeddings are unknown, so all ids of the stream cannot be matched any more.
        with pytest.raises(ValueError, match=r"token 47 of row 0 is .*, but in the stream it is an embedding"):
            model.generate(torch.cat((text, ids), dim=1), cache=cache, max_new_tokens=2)


def test_a_turn_makes_nothing_of_the_length_of_the_stream():
    model = enabled("llama")
    cache, ids, widths = sinkattn.SinkCache(model), random_ids(1, 300), set()

    def note(module, args, kwargs):
        widths.update(x.shape[-1] for x in kwargs.values() if isinstance(x, torch.Tensor) and x.ndim == 2)

    with torch.no_grad():
        model(ids, cache=cache)
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    output = model.generate(random_ids(1, 9, seed=2), cache=cache, max_new_tokens=20, **GREEDY)
    hook.remove()
    assert max(widths) <= 9 + 19  # until transformers 5.22, a mask of this turn is passed
    want = fresh(model, torch.cat((ids, random_ids(1, 9, seed=2)), dim=1))
    torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_of_a_mask_over_the_past_what_is_in_sight_is_read():
    model = enabled("llama")
    cache = sinkattn.SinkCache(model)
    model(random_ids(1, 100), cache=cache)
    mask = torch.ones(1, 101, dtype=torch.int64)
    mask[0, 99] = 0
    with pytest.raises(ValueError, match="attention_mask: expected 1 in row 0, column 99, as when that column was fed"):
        model(random_ids(1, 1), cache=cache, attention_mask=mask)
    mask[0, 99] = 1
    mask[0, 50] = 0  # no longer recorded
    model(random_ids(1, 1), cache=cache, attention_mask=mask)


@torch.no_grad()
def test_ones_that_nobody_has_read_are_no_padding(monkeypatch):
    """A mask that is not read on the host, as in a decode step on a GPU, adds no padding if it is all ones."""
    model = enabled("llama", headroom=3)
    cache, ids = sinkattn.SinkCache(model), random_ids(2, 60)
    model(ids[:, :57], cache=cache)
    monkeypatch.setattr(sinkattn.hf.inputs, "can_read_on_host", lambda x, tokens: False)
    for i in (57, 58):
        model(ids[:, i : i + 1], cache=cache, attention_mask=torch.ones(2, i + 1))
    cache.crop(-2)
    assert cache.seen.tolist() == [57, 57]
    torch.testing.assert_close(model(ids[:, 57:], cache=cache).logits[:, -1], fresh(model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pictures_in_later_turns():
    """A second image with all ids or only new ones; a prompt with images is never prefilled again."""
    model = llava()
    plain = copy.deepcopy(model)
    sinkattn.enable(model, S, 60)
    first, second = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2))
    place = torch.full((1, 4), PICTURES["image_token_id"])
    words = [random_ids(1, 5, seed=seed) % 90 + 2 for seed in range(4)]
    ids = torch.cat((words[0], place, words[1]), dim=1)
    cache, options = sinkattn.SinkCache(model), {"max_new_tokens": 6, "suppress_tokens": [96], **GREEDY}
    text = model.generate(ids, pixel_values=first, cache=cache, **options).sequences
    whole = torch.cat((text, words[2], place, words[3]), dim=1)
    want = plain(input_ids=whole, pixel_values=torch.cat((first, second))).logits[:, -1]
    for given in (whole, whole[:, 19:]):
        output = model.generate(given, pixel_values=second, cache=copy.deepcopy(cache), **options)
        torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model.generate(whole, pixel_values=torch.cat((first, second)), cache=copy.deepcopy(cache), **options)
    edited = torch.cat((whole[:, :16], whole[:, 17:]), dim=1)
    for pictures in ({"pixel_values": second}, {}):
        with pytest.raises(
            ValueError, match=r"token 16 of row 0 .* cannot be prefilled again with other inputs than ids"
        ):
            model.generate(edited, cache=cache, **pictures, **options)
    assert cache.get_seq_length() == 19


def test_other_inputs_are_not_fed_anew():
    model = enabled("llama")
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 20)
    text = model.generate(ids, cache=cache, max_new_tokens=5, do_sample=False)
    text[0, 22] = (text[0, 22] + 1) % 97
    with pytest.raises(ValueError, match=r"token 22 of row 0 .* cannot be prefilled again with other inputs than ids"):
        model.generate(text, cache=cache, max_new_tokens=2, logits_bias=torch.zeros(3))
    assert cache.get_seq_length() == 24


def test_what_feeds_all_that_it_is_given_wants_new_ids_alone(monkeypatch):
    model = enabled("llama", headroom=4)
    cache = sinkattn.SinkCache(model)
    text = model.generate(random_ids(1, 40), cache=cache, max_new_tokens=5, do_sample=False)
    whole = torch.cat((text, random_ids(1, 9, seed=3)), dim=1)
    monkeypatch.setattr(sinkattn.hf.generation.generate, "CHUNKS_HOLD_THE_PAST", True)
    for option in ("prefill_chunk_size", "prompt_lookup_num_tokens"):
        with pytest.raises(ValueError, match="input_ids: expected only new ids, because p"):
            model.generate(whole, cache=cache, max_new_tokens=2, **{option: 4})
    assert cache.get_seq_length() == 44


@pytest.mark.parametrize("headroom", [0, 8])
@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_states_do_not_go_back(family, headroom):
    model = sinkattn.enable(families.build(family), S, 12, headroom)
    model.generation_config.eos_token_id = None
    for prompt in (6, 40):
        cache = sinkattn.SinkCache(model)
        text = model.generate(random_ids(2, prompt), cache=cache, max_new_tokens=8, do_sample=False)
        whole = torch.cat((text[:, :-4], random_ids(2, 6, seed=5)), dim=1)
        whole[0, -7] = text[0, -4]  # the rows differ at different columns
        with pytest.warns(RuntimeWarning, match="are prefilled again, because they differ from those of the stream$"):
            output = model.generate(whole, cache=cache, max_new_tokens=3, **GREEDY)
        torch.testing.assert_close(output.logits[0], fresh(model, whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_call_again(family):
    """Refused, unless the first call was interrupted: then it is a retry."""
    model, ids = enabled(family), random_ids(1, 10)
    cache = sinkattn.SinkCache(model)
    model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="row 0 repeats the first 10 tokens of the stream"):
        model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False)
    # A call that transformers refuses is not an interrupted one.
    with pytest.raises(ValueError, match="typo"):
        model.generate(random_ids(1, 5, seed=3), cache=cache, typo=1)
    with pytest.raises(ValueError, match="row 0 repeats the first 10 tokens of the stream"):
        model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False)

    class Interrupt(TextStreamer):
        def __init__(self, after):
            self.left = after

        def put(self, value):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

        def end(self):
            pass

    for after in (0, 1, 3):
        cache.reset()
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, cache=cache, max_new_tokens=5, streamer=Interrupt(after), do_sample=False)
        output = model.generate(ids, cache=cache, max_new_tokens=3, **GREEDY)
        torch.testing.assert_close(output.logits[0], fresh(model, ids), rtol=1e-4, atol=1e-4)
        assert cache.seen.tolist() == [12]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", [0, 5, 15, "shorter", "longer"])
def test_a_conversation_whose_beginning_was_edited(family, edit):
    """A system prompt with the date, for example: the tokens after it are found, even at other token numbers."""
    model = enabled(family)
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 40)
    text = model.generate(ids, cache=cache, max_new_tokens=8, do_sample=False)
    whole = torch.cat((text, random_ids(1, 5, seed=3)), dim=1)
    if edit == "shorter":
        whole = torch.cat((whole[:, :2], whole[:, 4:]), dim=1)
    elif edit == "longer":
        whole = torch.cat((whole[:, :2], random_ids(1, 3, seed=8), whole[:, 2:]), dim=1)
    else:
        whole[0, edit] = (whole[0, edit] + 1) % 90 + 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(whole, cache=cache, max_new_tokens=3, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole), rtol=1e-4, atol=1e-4)
    assert cache.seen.tolist() == [whole.shape[1] + 2]


def test_settings_of_generate_are_no_pictures():
    model = enabled("llama")
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 20)
    text = model.generate(ids, cache=cache, max_new_tokens=5, do_sample=False)
    text[0, 22] = (text[0, 22] + 1) % 90 + 2
    settings = {"sequence_bias": {(5,): 1.0}, "eos_token_id": torch.tensor(96), "max_new_tokens": 2}
    output = model.generate(text, cache=cache, **settings, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, text), rtol=1e-4, atol=1e-4)


def test_a_generate_within_a_generate_needs_a_cache_of_its_own():
    model = enabled("llama")
    cache = sinkattn.SinkCache(model)

    class Nested(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            model.generate(random_ids(1, 4), cache=cache, max_new_tokens=2)

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="cache: is in another generate already"):
        model.generate(random_ids(1, 9), cache=cache, max_new_tokens=3, streamer=Nested())
    output = model.generate(random_ids(1, 9), cache=cache, max_new_tokens=3, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, random_ids(1, 9)), rtol=1e-4, atol=1e-4)
