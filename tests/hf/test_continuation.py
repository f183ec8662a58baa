"""`generate` that continues streams: every turn gives the logits of a new stream that is fed all tokens.

Conversations that are tokenized again and differ from what was fed, hypotheses of beam search, rows that end before
others, embeddings, several continuations of one stream.
"""

import copy
import pickle
import warnings

import families
import pytest
import torch
from hf_models import SIZES, build, build_model, random_ids
from test_generate import S, W, greedy
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.stopping_criteria import EosTokenCriteria

import sinkattn
from sinkattn.hf.versions import CHUNKS_HOLD_THE_PAST, forward_cache

FAMILIES = ["llama", "gpt2"]
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def enabled(family: str, headroom: int = 0):
    return sinkattn.enable(build(family), S, W, headroom)


@torch.no_grad()
def fresh(model, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of the last token of a new stream fed in one call; with a mask, of each row by itself without padding."""
    if mask is None:
        return model(ids).logits[:, -1]
    return torch.cat([model(ids[i : i + 1, mask[i].bool()]).logits[:, -1] for i in range(len(ids))])


class FedTokenCounter:
    """Counts the tokens per row that a decoder is fed, padding included."""

    def __init__(self, model):
        self.tokens = 0
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        ids = args[0] if args else kwargs.get("input_ids")
        self.tokens += (kwargs["inputs_embeds"] if ids is None else ids).shape[1]

    def take(self) -> int:
        tokens, self.tokens = self.tokens, 0
        return tokens


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
def test_a_conversation_encoded_anew(family, prompt, headroom, how):
    model = enabled(family, headroom)
    fed = FedTokenCounter(model)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("beams", "returned"), [(3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize(("prompt", "headroom"), [(12, 0), (60, 0), (60, 12)], ids=["fits", "evicted", "headroom"])
def test_rows_follow_what_beam_search_returns(family, beams, returned, prompt, headroom):
    """The next turn may pass all ids. Only new ids, and direct calls, need rows that could be rolled back."""
    model = enabled(family, headroom)
    model.generation_config.pad_token_id = 0
    for seed in range(6):
        cache, ids = sinkattn.SinkCache(model), random_ids(2, prompt, seed=100 + seed)
        options = {"num_beams": beams, "num_return_sequences": returned, "do_sample": False}
        if seed % 2:
            options["eos_token_id"] = int(greedy(model, ids, 3)[0, -1])
        text = model.generate(ids, cache=cache, max_new_tokens=8, **options)
        lengths = ends(text, prompt, options.get("eos_token_id"))
        mask = (torch.arange(text.shape[1]) < lengths[:, None]).to(torch.int64)
        new = random_ids(1, 5, seed=9).expand(len(text), -1)
        whole, mask = torch.cat((text, new), dim=1), torch.cat((mask, torch.ones_like(new)), dim=1)
        want = fresh(model, whole, mask)
        for given_mask in (mask, torch.ones_like(mask)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                output = model.generate(
                    whole, attention_mask=given_mask, cache=copy.deepcopy(cache), max_new_tokens=3, **GREEDY
                )
            torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
        new = torch.cat((text[:, -1:], new), dim=1)
        if cache.state.unusable_reason is None:
            assert len(cache.seen) == len(text)
            assert torch.equal(cache.seen, torch.minimum(lengths, torch.tensor(text.shape[1] - 1)))
            output = model.generate(new, cache=copy.deepcopy(cache), max_new_tokens=3, **GREEDY)
            torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
        else:
            assert (prompt, headroom) == (60, 0)
            for call in (model, model.generate):
                with torch.no_grad(), pytest.raises(RuntimeError, match="beam search returned other hypotheses"):
                    call(new, **{forward_cache(model): cache})


def ends(text: torch.Tensor, prompt: int, eos: int | None) -> torch.Tensor:
    """Columns of each row up to its end-of-sequence token, included."""
    rows = [row.tolist() for row in text[:, prompt:]]
    return torch.tensor([prompt + (row.index(eos) + 1 if eos in row else len(row)) for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_prefix_and_several_continuations(family):
    model = enabled(family)
    prefix, new = random_ids(1, 50), random_ids(4, 6, seed=4)
    filled = sinkattn.SinkCache(model)
    name = forward_cache(model)
    with torch.no_grad():
        model(prefix, **{name: filled})
        want = [fresh(model, torch.cat((prefix, row[None]), dim=1)) for row in new]
        several = copy.deepcopy(filled)
        several.batch_repeat_interleave(4)
        some = copy.deepcopy(several)
        got = model(new, **{name: several}).logits[:, -1]
        torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
        some.batch_select_indices(torch.tensor([1, -1]))
        got = model(new[[1, 3]], **{name: some}).logits[:, -1]
        torch.testing.assert_close(got, torch.cat([want[1], want[3]]), rtol=1e-4, atol=1e-4)
        assert several.seen.tolist() == [56] * 4
        # Rows whose streams differ.
        mixed = torch.cat([torch.cat((prefix, new[row : row + 1]), dim=1) for row in (3, 3, 0)])
        several.batch_select_indices(torch.tensor([False, True, True, True]))
        several.batch_select_indices(torch.tensor([2, 2, 0]))
        mixed[2, 50:] = new[1]
        more = random_ids(3, 40, seed=8)
        got = model(more, **{name: several}).logits[:, -1]
        torch.testing.assert_close(got, fresh(model, torch.cat((mixed, more), dim=1)), rtol=1e-4, atol=1e-4)
    whole = torch.cat((prefix, new[:1]), dim=1)
    for options in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3, "do_sample": False}):
        for given in (whole, new[:1]):
            torch.manual_seed(0)
            got = model.generate(given, cache=copy.deepcopy(filled), max_new_tokens=20, **options)
            torch.manual_seed(0)
            assert torch.equal(got[:, -20:], model.generate(whole, max_new_tokens=20, **options)[:, -20:])


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_cannot_be_taken_are_refused(family):
    model = enabled(family)
    cache = sinkattn.SinkCache(model, max_batch_size=3)
    cache.batch_repeat_interleave(2)  # of an empty cache
    with torch.no_grad():
        model(random_ids(2, 9), **{forward_cache(model): cache})
    for indices in ([2], [-3], [], [[0]], [0.0]):
        with pytest.raises(ValueError, match="indices: expected"):
            cache.batch_select_indices(torch.tensor(indices))
    with pytest.raises(ValueError, match="max_batch_size is 3, got 4 rows"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="repeats: expected 1 or more, got 0"):
        cache.batch_repeat_interleave(0)
    with pytest.raises(ValueError, match=r"holds 2 streams, got new ids of 1; repeat or select its rows first"):
        model.generate(random_ids(1, 4, seed=3), cache=cache, max_new_tokens=2)
    assert cache.seen.tolist() == [9, 9]


class StopAt(StoppingCriteria):
    """Ends rows at a token, and counts its calls: one per generated token."""

    def __init__(self, token: int):
        self.token, self.calls = token, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["exact", "ones", "none"])
@pytest.mark.parametrize("by", ["eos", "criterion"])
@pytest.mark.parametrize("pad", [0, None], ids=["pad", "pad is eos"])
def test_a_row_that_ends_before_others_is_fed_no_padding(family, mask, by, pad):
    """Three turns of a batch, with all ids and with only new ones; each row equals the same row by itself."""
    model = enabled(family, headroom=4)
    ids = random_ids(2, 10, seed=61)
    alone = [greedy(model, ids[i : i + 1], 8)[0, 10:].tolist() for i in range(2)]
    end = next(token for token in alone[0][:5] if token not in alone[1])
    ended = alone[0].index(end) + 1
    eos = end if by == "eos" else 96
    stop = StopAt(end)
    options = {"eos_token_id": eos, "pad_token_id": eos if pad is None else pad, "do_sample": False}
    if by == "criterion":
        options["stopping_criteria"] = StoppingCriteriaList([stop])
    cache, only_new = sinkattn.SinkCache(model), sinkattn.SinkCache(model)
    text = model.generate(ids, cache=cache, max_new_tokens=8, **options)
    assert stop.calls == (8 if by == "criterion" else 0)
    model.generate(ids, cache=only_new, max_new_tokens=8, **options)
    keep = torch.ones_like(text)
    keep[0, 10 + ended :] = 0
    assert cache.seen.tolist() == [10 + ended, 17]
    assert cache.get_seq_length() == 17
    for turn in range(2):
        new = random_ids(2, 5, seed=63 + turn)
        pending = text[:, -1:]
        whole, keep = torch.cat((text, new), dim=1), torch.cat((keep, torch.ones_like(new)), dim=1)
        given = {"exact": keep, "ones": torch.ones_like(keep), "none": None}[mask]
        more = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0} | GREEDY
        output = model.generate(whole, attention_mask=given, cache=cache, **more)
        want = fresh(model, whole, keep)
        torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
        given = {"exact": keep[:, -6:], "ones": torch.ones(2, 6, dtype=torch.int64), "none": None}[mask]
        new = torch.cat((pending, new), dim=1)
        other = model.generate(new, attention_mask=given, cache=only_new, **more)
        torch.testing.assert_close(other.logits[0], want, rtol=1e-4, atol=1e-4)
        text = output.sequences
        keep = torch.cat((keep, torch.ones(2, 4, dtype=torch.int64)), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_encoded_anew_with_padding_elsewhere(family):
    """Padding on the left of a different width in each turn, and a reply of which a part is dropped."""
    model = enabled(family, headroom=8)
    lengths = (6, 13)
    rows = [random_ids(1, length, seed=length)[0] for length in lengths]
    ids, mask = left_padded(rows)
    cache = sinkattn.SinkCache(model)
    text = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=6, do_sample=False)
    rows = [torch.cat((row, reply)) for row, reply in zip(rows, text[:, 13:], strict=True)]
    rows[1] = torch.cat((rows[1][:-3], rows[1][-2:]))
    for turn in range(3):
        rows = [torch.cat((row, random_ids(1, 4 + 20 * i, seed=turn)[0])) for i, row in enumerate(rows)]
        ids, mask = left_padded(rows)
        fed = FedTokenCounter(model)
        output = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=6, **GREEDY)
        assert family == "gpt2" or fed.take() <= 4 + 20 + 5 + 5
        torch.testing.assert_close(output.logits[0], fresh(model, ids, mask), rtol=1e-4, atol=1e-4)
        assert cache.seen.tolist() == [len(row) + 5 for row in rows]
        rows = [torch.cat((row, reply)) for row, reply in zip(rows, output.sequences[:, ids.shape[1] :], strict=True)]


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return ids, mask


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
    model.register_forward_pre_hook(note, with_kwargs=True)
    output = model.generate(random_ids(1, 9, seed=2), cache=cache, max_new_tokens=20, **GREEDY)
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
def test_columns_with_padding_can_be_taken_back():
    model = enabled("llama", headroom=6)
    cache, ids = sinkattn.SinkCache(model), random_ids(2, 60)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[1, 55:58] = 0
    model(ids, attention_mask=mask, cache=cache)
    assert cache.seen.tolist() == [60, 57]
    cache.crop(-4)
    assert cache.seen.tolist() == [56, 55]
    new = random_ids(2, 3, seed=4)
    got = model(new, cache=cache).logits[:, -1]
    want = [fresh(model, torch.cat((ids[i : i + 1, : 56 - i], new[i : i + 1]), dim=1)) for i in range(2)]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_later_turns_in_chunks_and_with_padding(family):
    model = enabled(family)
    rows = [random_ids(1, length, seed=length)[0] for length in (6, 43)]
    ids, mask = left_padded(rows)
    cache = sinkattn.SinkCache(model)
    for turn in range(4):
        output = model.generate(
            ids, attention_mask=mask, cache=cache, max_new_tokens=6, prefill_chunk_size=7, pad_token_id=0, **GREEDY
        )
        if turn == 0:
            whole, whole_mask = output.sequences, torch.cat((mask, torch.ones(2, 6, dtype=torch.int64)), dim=1)
        elif turn < 3 or CHUNKS_HOLD_THE_PAST:
            whole = torch.cat((whole, ids[:, 1:], output.sequences[:, -6:]), dim=1)
            whole_mask = torch.cat((whole_mask, mask[:, 1:], torch.ones(2, 6, dtype=torch.int64)), dim=1)
        else:
            whole, whole_mask = output.sequences, torch.cat((mask, torch.ones(2, 6, dtype=torch.int64)), dim=1)
        want = fresh(model, whole[:, :-6], whole_mask[:, :-6])
        torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
        new, new_mask = left_padded([random_ids(1, length, seed=turn)[0] for length in (19, 4)])
        last = torch.ones(2, 1, dtype=torch.int64)
        if turn < 2 or CHUNKS_HOLD_THE_PAST:
            ids, mask = torch.cat((whole[:, -1:], new), dim=1), torch.cat((last, new_mask), dim=1)
        else:
            ids, mask = torch.cat((whole, new), dim=1), torch.cat((whole_mask, new_mask), dim=1)


def llava():
    pictures = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    text = LlamaConfig(**SIZES, num_key_value_heads=2)
    return build_model(LlavaForConditionalGeneration, LlavaConfig, vision_config=pictures, text_config=text, **PICTURES)


PICTURES = {"image_token_id": 96, "image_seq_length": 4}


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


def test_hybrids_say_that_a_row_has_ended():
    """Their states cannot skip padding."""
    model = sinkattn.enable(families.build("lfm2"), S, 12)
    model.generation_config.eos_token_id = None
    ids = random_ids(2, 10, seed=61)
    alone = [greedy(model, ids[i : i + 1], 8)[0, 10:].tolist() for i in range(2)]
    end = next(token for token in alone[0][:5] if token not in alone[1])
    cache = sinkattn.SinkCache(model)
    text = model.generate(ids, cache=cache, max_new_tokens=8, eos_token_id=end, pad_token_id=0, do_sample=False)
    for ids in (random_ids(2, 3), torch.cat((text, random_ids(2, 3, seed=5)), dim=1)):
        with pytest.raises(RuntimeError, match=r"row 0 ended before others, .* run rows .* one by one"):
            model.generate(ids, cache=cache, max_new_tokens=2)
    cache.reset()
    output = model.generate(ids, cache=cache, attention_mask=torch.ones_like(ids), max_new_tokens=2, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, ids), rtol=1e-4, atol=1e-4)


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


def one_row_ends(model, cache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch whose row 0 ends early: all ids and 5 new ones, the mask of both, and only the new ids."""
    ids = random_ids(2, 10, seed=61)
    alone = [greedy(model, ids[i : i + 1], 8)[0, 10:].tolist() for i in range(2)]
    end = next(token for token in alone[0][:5] if token not in alone[1])
    text = model.generate(ids, cache=cache, max_new_tokens=8, eos_token_id=end, pad_token_id=0, do_sample=False)
    new = random_ids(2, 5, seed=3)
    whole, keep = torch.cat((text, new), dim=1), torch.ones(2, 23, dtype=torch.int64)
    keep[0, 10 + alone[0].index(end) + 1 : 18] = 0
    return whole, keep, torch.cat((text[:, -1:], new), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", ["a row ends at once", "nobody ends", "long replies"])
def test_new_ids_beside_a_row_that_is_mostly_padding(family, shape):
    """All recorded columns of one row are padding, but its tokens are recorded."""
    model = enabled(family)
    lengths, reply = {
        "a row ends at once": ((6, 80), 50),
        "nobody ends": ((30, 120), 40),
        "long replies": ((5, 75), 80),
    }[shape]
    rows = [random_ids(1, length, seed=length)[0] for length in lengths]
    ids, mask = left_padded(rows)
    options = {"eos_token_id": 96, "pad_token_id": 0, "suppress_tokens": [96, 0], "do_sample": False}
    ends = ids.shape[1] + (2 if shape == "a row ends at once" else reply)

    class FirstRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= ends, False])

    options["stopping_criteria"] = StoppingCriteriaList([FirstRow()])
    cache = sinkattn.SinkCache(model)
    text = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=reply, **options)
    replies = [text[0, ids.shape[1] : ends], text[1, ids.shape[1] :]]
    for turn in range(2):
        new = random_ids(2, 9, seed=7 + turn)
        rows = [torch.cat((row, said, more)) for row, said, more in zip(rows, replies, new, strict=True)]
        output = model.generate(torch.cat((text[:, -1:], new), dim=1), cache=cache, max_new_tokens=reply, **GREEDY)
        want = torch.cat([fresh(model, row[None]) for row in rows])
        torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)
        text, replies = output.sequences, list(output.sequences[:, -reply:])
        assert cache.seen.tolist() == [len(row) + reply - 1 for row in rows]


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
def test_a_call_that_transformers_refuses_changes_nothing(family):
    model = enabled(family, headroom=8)
    cache = sinkattn.SinkCache(model)
    whole, keep, new = one_row_ends(model, cache)
    whole[1, 13] = (whole[1, 13] + 1) % 90 + 2
    before = cache.seen.tolist()
    for wrong in ({"typo": 1}, {"num_return_sequences": 3, "do_sample": False}):
        for given in (whole, new):
            with pytest.raises(ValueError, match=r"typo|num_return_sequences"):
                model.generate(given, cache=cache, max_new_tokens=3, **wrong)
            assert (cache.seen.tolist(), cache.get_seq_length()) == (before, 17)

    def interrupt(*args):
        raise KeyboardInterrupt

    blocks = model.model.layers if family == "llama" else model.transformer.h
    handle = blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(whole, cache=cache, max_new_tokens=3, **GREEDY)
    handle.remove()
    output = model.generate(whole, cache=cache, max_new_tokens=3, attention_mask=keep, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole, keep), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", ["exact", "ones", "none"])
def test_another_row_than_the_one_that_ended_is_edited(family, mask):
    model = enabled(family, headroom=8)
    cache = sinkattn.SinkCache(model)
    whole, keep, _ = one_row_ends(model, cache)
    whole[1, 15] = (whole[1, 15] + 1) % 90 + 2
    given = {"exact": keep, "ones": torch.ones_like(keep), "none": None}[mask]
    output = model.generate(whole, attention_mask=given, cache=cache, max_new_tokens=3, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole, keep), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["edited", "dropped"])
def test_a_row_that_ended_long_ago_is_edited(family, how):
    """All of its recorded columns are padding, but its tokens are still in the ring."""
    model = enabled(family)
    ids, ends = random_ids(2, 70), 76

    class FirstRow(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= ends, False])

    cache = sinkattn.SinkCache(model)
    options = {"eos_token_id": 96, "pad_token_id": 0, "suppress_tokens": [96, 0], "do_sample": False}
    options["stopping_criteria"] = StoppingCriteriaList([FirstRow()])
    text = model.generate(ids, cache=cache, max_new_tokens=60, **options)
    rows = [text[0, :ends], text[1]]
    rows[0] = rows[0].clone()
    rows[0][73] = (rows[0][73] + 1) % 90 + 2
    rows[0] = torch.cat((rows[0][:71], rows[0][74:])) if how == "dropped" else rows[0]
    whole, mask = left_padded([torch.cat((row, new)) for row, new in zip(rows, random_ids(2, 5, seed=3), strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model.generate(whole, attention_mask=mask, cache=cache, max_new_tokens=2, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eos", [None, 96])
def test_tokens_of_a_hypothesis_that_are_like_padding_are_tokens(eos):
    model, ids = enabled("llama"), random_ids(1, 12, seed=1)
    last = int(model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)[0, -1])
    cache = sinkattn.SinkCache(model)
    options = {"num_beams": 3, "do_sample": False, "pad_token_id": last, "eos_token_id": eos, "suppress_tokens": [96]}
    text = model.generate(ids, cache=cache, max_new_tokens=4, **options)
    assert text[0, -1] == last
    assert cache.seen.tolist() == [15]
    whole = torch.cat((text, random_ids(1, 5, seed=3)), dim=1)
    for given in (whole, whole[:, 15:]):
        output = model.generate(given, cache=copy.deepcopy(cache), max_new_tokens=2, **GREEDY)
        torch.testing.assert_close(output.logits[0], fresh(model, whole), rtol=1e-4, atol=1e-4)


class OwnEos(EosTokenCriteria):
    """Another class than transformers' own, so it does not replace the default criterion."""


class HasEos(StopAt):
    """transformers pads ended rows if a criterion has this attribute."""

    @property
    def eos_token_id(self):
        return self.token


@pytest.mark.parametrize("criterion", [OwnEos, HasEos, EosTokenCriteria])
def test_criteria_of_the_users(criterion):
    model, plain = enabled("llama", headroom=4), build("llama")
    ids = random_ids(2, 10, seed=61)
    alone = [greedy(model, ids[i : i + 1], 8)[0, 10:].tolist() for i in range(2)]
    end = next(token for token in alone[0][:5] if token not in alone[1])
    options = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}
    want = plain.generate(ids, stopping_criteria=StoppingCriteriaList([criterion(end)]), **options)
    cache = sinkattn.SinkCache(model)
    text = model.generate(ids, cache=cache, stopping_criteria=[criterion(end)], **options)
    assert torch.equal(text, want)
    assert (text[0] == 0).any()
    assert cache.seen.tolist() == [10 + alone[0].index(end) + 1, 17]


def test_time_runs_out_for_all_rows_at_once():
    """The criterion is called once per token, as a second call may give another result."""
    model = enabled("llama")
    clock = MaxTimeCriteria(1e9)
    asked = []
    model_eos = {"eos_token_id": 96, "pad_token_id": 0}
    original = MaxTimeCriteria.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaxTimeCriteria, "__call__", lambda *args, **kwargs: asked.append(1) or original(*args, **kwargs))
        model.generate(random_ids(2, 9), stopping_criteria=[clock], max_new_tokens=6, **model_eos)
    assert len(asked) == 6


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


@torch.no_grad()
def test_pictures_are_not_fed_anew_after_a_beam_search():
    model = sinkattn.enable(llava(), S, 12)
    picture = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.cat(
        (random_ids(1, 20) % 90 + 2, torch.full((1, 4), PICTURES["image_token_id"]), random_ids(1, 5)), dim=1
    )
    cache, options = sinkattn.SinkCache(model), {"max_new_tokens": 9, "suppress_tokens": [96], "do_sample": False}
    for seed in range(20):
        cache.reset()
        ids[0, 0] = seed + 2
        text = model.generate(ids, pixel_values=picture, cache=cache, num_beams=3, **options)
        if cache.state.unusable_reason is not None:
            break
    assert cache.state.unusable_reason is not None
    with pytest.raises(RuntimeError, match="beam search returned other hypotheses"):
        model.generate(torch.cat((text, random_ids(1, 5) % 90 + 2), dim=1), cache=cache, **options)


def test_settings_of_generate_are_no_pictures():
    model = enabled("llama")
    cache, ids = sinkattn.SinkCache(model), random_ids(1, 20)
    text = model.generate(ids, cache=cache, max_new_tokens=5, do_sample=False)
    text[0, 22] = (text[0, 22] + 1) % 90 + 2
    settings = {"sequence_bias": {(5,): 1.0}, "eos_token_id": torch.tensor(96), "max_new_tokens": 2}
    output = model.generate(text, cache=cache, **settings, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, text), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_without_any_token_yet(family):
    model = enabled(family)
    cache, ids, new = sinkattn.SinkCache(model), random_ids(2, 30), random_ids(2, 7, seed=3)
    mask = torch.tensor([[0], [1]]).expand(2, 30)
    model(ids, attention_mask=mask, **{forward_cache(model): cache})
    output = model.generate(new, cache=cache, max_new_tokens=2, **GREEDY)
    want = torch.cat((fresh(model, new[:1]), fresh(model, torch.cat((ids[1:], new[1:]), dim=1))))
    torch.testing.assert_close(output.logits[0], want, rtol=1e-4, atol=1e-4)


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


def test_embeddings_after_a_row_ended():
    model = enabled("llama", headroom=4)
    cache = sinkattn.SinkCache(model)
    whole, keep, new = one_row_ends(model, cache)
    given = model.get_input_embeddings()(new).detach()
    output = model.generate(inputs_embeds=given, cache=cache, max_new_tokens=2, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole, keep), rtol=1e-4, atol=1e-4)
