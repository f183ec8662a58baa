"""`generate` that continues several streams: every row gives the logits of a new stream that is fed its tokens.

Hypotheses of beam search, several continuations of one stream, rows that end before others, padding.
"""

import copy
import warnings

import families
import pytest
import torch
from continued import FAMILIES, GREEDY, PICTURES, enabled, fresh, left_padded, llava
from hf_models import build, random_ids
from test_generate import S, greedy
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

import sinkattn
from sinkattn.hf.versions import CHUNKS_HOLD_THE_PAST, forward_cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("beams", "returned"), [(3, 1), (3, 2), (3, 3)])
@pytest.mark.parametrize(("prompt", "headroom"), [(12, 0), (60, 0), (60, 12)], ids=["fits", "evicted", "headroom"])
def test_rows_follow_what_beam_search_returns(family, beams, returned, prompt, headroom, monkeypatch):
    """The next turn may pass all ids. Only new ids, and direct calls, need rows that could be rolled back."""
    model = enabled(family, headroom)
    monkeypatch.setattr(model.generation_config, "pad_token_id", 0)
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
def test_rows_encoded_anew_with_padding_elsewhere(family, count_fed):
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
        fed = count_fed(model)
        output = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=6, **GREEDY)
        assert family == "gpt2" or fed.take() <= 4 + 20 + 5 + 5
        torch.testing.assert_close(output.logits[0], fresh(model, ids, mask), rtol=1e-4, atol=1e-4)
        assert cache.seen.tolist() == [len(row) + 5 for row in rows]
        rows = [torch.cat((row, reply)) for row, reply in zip(rows, output.sequences[:, ids.shape[1] :], strict=True)]


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


def test_embeddings_after_a_row_ended():
    model = enabled("llama", headroom=4)
    cache = sinkattn.SinkCache(model)
    whole, keep, new = one_row_ends(model, cache)
    given = model.get_input_embeddings()(new).detach()
    output = model.generate(inputs_embeds=given, cache=cache, max_new_tokens=2, **GREEDY)
    torch.testing.assert_close(output.logits[0], fresh(model, whole, keep), rtol=1e-4, atol=1e-4)
