"""Padded batches of models that stream by re-encoding: every row gives the same outputs as alone."""

import copy
import io

import pytest
import torch
from hf_models import ABSOLUTE, build, interrupted, random_ids, tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from measures import rms_error
from test_reencode import greedy, oracle

import sinkattn
from sinkattn.hf.reencode.lanes import context_start, kept_tokens, rebuild_period
from sinkattn.ops import RingLayout

S, W = 3, 12
LENGTHS = (3, 20, 60, 33)


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of a batch of rows ``[1, n]`` of different lengths. The id of padding is invalid in every model."""
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.full((len(rows), width), -100), torch.zeros(len(rows), width, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for i, row in enumerate(rows):
        length = row.shape[1]
        places = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "within": torch.randperm(width, generator=generator)[:length].sort().values,
        }[side]
        ids[i, places], mask[i, places] = row[0], 1
    return ids, mask


def feed(model, cache, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, cache=cache).logits


def feed_rows(model, cache, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits ``[1, n, vocabulary]`` of each row's new tokens ``[1, n]``, in one call with padding on the right."""
    ids, mask = padded(rows, "right")
    logits = feed(model, cache, ids, mask)
    return [logits[i : i + 1, : row.shape[1]] for i, row in enumerate(rows)]


def some_rows(lengths=LENGTHS) -> list[torch.Tensor]:
    return [random_ids(1, length, seed=seed) for seed, length in enumerate(lengths)]


@pytest.fixture(params=ABSOLUTE, scope="module")
def family(request):
    """An enabled model of each family, and the unpatched model's logits for each row alone."""
    model = build(request.param)
    with torch.no_grad():
        want = [oracle(model, row)[0] for row in some_rows()]
    return sinkattn.enable(model, S, W, headroom=4), want


@pytest.fixture(scope="module")
def gpt2():
    """An enabled GPT-2, the unpatched model's logits for each row alone, and the unpatched model."""
    model = build("gpt2")
    plain = copy.deepcopy(model)
    with torch.no_grad():
        want = [oracle(model, row)[0] for row in some_rows()]
    return sinkattn.enable(model, S, W, headroom=4), want, plain


@pytest.mark.parametrize("side", ["left", "right", "within"])
@pytest.mark.parametrize("cuts", [[60], [25, 1, 1, 33]], ids=str)
def test_every_row_is_as_it_is_alone(family, side, cuts):
    model, want = family
    ids, mask = padded(some_rows(), side)
    cache, out, end = sinkattn.SinkCache(model), [], 0
    for part in ids.split(cuts, dim=1):
        end += part.shape[1]
        out.append(feed(model, cache, part, mask[:, :end]))
    got = torch.cat(out, dim=1)
    for row, alone in enumerate(want):
        assert rms_error(got[row, mask[row].bool()], alone) < 2e-6
    assert cache.seen.tolist() == list(LENGTHS)
    assert cache.has_padding
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("side", ["left", "right", "within"])
def test_decode_steps_of_rows_that_bring_nothing_now_and_then(gpt2, side):
    model, want, _ = gpt2
    ids, mask = padded(some_rows(), side)
    cache = sinkattn.SinkCache(model)
    got = torch.cat([feed(model, cache, ids[:, i : i + 1], mask[:, : i + 1]) for i in range(60)], dim=1)
    for row, alone in enumerate(want):
        assert rms_error(got[row, mask[row].bool()], alone) < 2e-6


def test_masks_of_the_new_tokens_alone(gpt2):
    model, want, _ = gpt2
    ids, mask = padded(some_rows(), "within")
    cache = sinkattn.SinkCache(model)
    got = torch.cat([feed(model, cache, ids[:, cut], mask[:, cut]) for cut in (slice(0, 31), slice(31, 60))], dim=1)
    for row, alone in enumerate(want):
        assert rms_error(got[row, mask[row].bool()], alone) < 2e-6


@torch.no_grad()
def test_padding_that_is_taken_for_tokens_is_noticed(gpt2, monkeypatch):
    model, want, _ = gpt2
    ids, mask = padded(some_rows(), "left")
    ids = ids.clamp(min=0)
    assert rms_error(model(ids, attention_mask=mask).logits[1, 40:], want[1]) < 2e-6
    monkeypatch.setattr(sinkattn.hf.reencode.patch, "_padding", lambda *args: None)
    assert rms_error(model(ids, attention_mask=mask).logits[1, 40:], want[1]) > 1e-2


@torch.no_grad()
def test_outputs_at_padding_are_zeros(gpt2):
    model, _, _ = gpt2
    ids, mask = padded(some_rows(), "within")
    output = model.transformer(ids, attention_mask=mask, output_hidden_states=True)
    states = (output.last_hidden_state, *output.hidden_states)
    assert [x.shape for x in states] == [(4, 60, 32)] * 4
    for x in states:
        assert not x[mask == 0].any()
        assert x[mask == 1].any(dim=-1).all()


def test_a_call_of_nothing_but_padding(gpt2):
    model, want, _ = gpt2
    cache, row, nothing = sinkattn.SinkCache(model), some_rows()[1], torch.zeros(1, 5, dtype=torch.int64)
    for part in row.split([7, 13], dim=1):
        logits = feed(model, cache, nothing - 100, nothing)
        assert logits.shape == (1, 5, 97)
        assert not logits.any()
        start = cache.seen.item()
        got = feed(model, cache, part)
        assert rms_error(got[0], want[1][start : start + part.shape[1]]) < 2e-6
    assert (cache.seen.tolist(), cache.get_seq_length(), cache.has_padding) == ([20], 30, True)


def max_ids(layout: RingLayout) -> int:
    """Largest number of ids that a stream keeps."""
    return layout.num_sinks + layout.window - 1 + layout.headroom


def length(row: list[int | None]) -> int:
    """Number of tokens in a row of columns; None is padding."""
    return sum(token is not None for token in row)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_streams_of_any_padding_rollbacks_and_rows(data):
    """Compare with the unpatched model on each row's context; the test keeps rows as plain lists of columns."""
    layout = RingLayout(S, W, data.draw(st.integers(0, 5)))
    model, generator = build("gpt2", num_hidden_layers=1), torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    plain = copy.deepcopy(model)
    sinkattn.enable(model, S, W, layout.headroom)
    cache, rows, checked = sinkattn.SinkCache(model), [[] for _ in range(data.draw(st.integers(1, 4)))], []
    furthest = [0] * len(rows)
    for _ in range(data.draw(st.integers(2, 7))):
        tokens = data.draw(st.sampled_from([1, 1, 2, 9, 30]))
        share = data.draw(st.sampled_from([0.3, 0.8, 1.0]))
        mask = torch.rand(len(rows), tokens, generator=generator) < share
        ids = torch.randint(2, 97, mask.shape, generator=generator)
        logits = feed(model, cache, ids, mask.to(torch.int64))
        for i, row in enumerate(rows):
            for column in range(tokens):
                row.append(int(ids[i, column]) if mask[i, column] else None)
                if mask[i, column]:
                    checked.append(([token for token in row if token is not None], logits[i, column]))
        furthest = [max(before, length(row)) for before, row in zip(furthest, rows, strict=True)]
        kind = data.draw(st.sampled_from(["go on", "crop", "reorder", "repeat", "select", "fork"]))
        if kind == "crop":
            count = data.draw(st.integers(0, layout.headroom) | st.integers(0, max_ids(layout)))
            left = [row[: max(0, len(row) - count)] for row in rows]
            try:
                cache.crop(-count)
                rows = left
            except RuntimeError:
                # A stream can always go back by the headroom.
                lost = [before - length(row) for before, row in zip(furthest, left, strict=True)]
                assert max(lost) > layout.headroom or count > len(rows[0])
        elif kind == "repeat" and len(rows) < 3:
            cache.batch_repeat_interleave(2)
            rows = [list(row) for row in rows for _ in range(2)]
            furthest = [before for before in furthest for _ in range(2)]
        elif kind in ("reorder", "select"):
            size = len(rows) if kind == "reorder" else data.draw(st.integers(1, 5))
            index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=size, max_size=size))
            (cache.reorder_cache if kind == "reorder" else cache.batch_select_indices)(torch.tensor(index))
            rows, furthest = [list(rows[i]) for i in index], [furthest[i] for i in index]
        elif kind == "fork":
            cache = copy.deepcopy(cache)
        assert cache.seen.tolist() == [length(row) for row in rows]
        assert cache.get_seq_length() == len(rows[0])
        assert all(lane.ids.shape[1] <= max_ids(layout) for lane in cache.lanes)
    for stream, got in checked:
        token = len(stream) - 1
        context = stream[: min(S, token + 1)] + stream[context_start(token, layout) :]
        with torch.no_grad():
            want = plain(torch.tensor([context]), use_cache=False).logits[0, -1]
        assert rms_error(got, want) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("absolute", ["gpt2", "opt"])
def test_generate_on_left_padded_rows_equals_each_alone(absolute):
    model, rows = build(absolute), some_rows((3, 20, 50, 33))
    ids, mask = padded(rows, "left")
    ids = ids.clamp(min=0)
    want = [greedy(model, row, 40)[0, -40:] for row in rows]
    sinkattn.enable(model, S, W)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    for row, alone in enumerate(want):
        assert torch.equal(got[row, 50:], alone)


@torch.no_grad()
def test_turns_of_padded_rows(gpt2):
    model, _, plain = gpt2
    rows, new = some_rows((3, 40)), random_ids(2, 7, seed=3)
    ids, mask = padded(rows, "left")
    cache, options = sinkattn.SinkCache(model), {"max_new_tokens": 40, "do_sample": False}
    got = model.generate(ids.clamp(min=0), attention_mask=mask, cache=cache, **options)
    again = model.generate(torch.cat((got[:, -1:], new), dim=1), cache=cache, **options)
    for row, alone in enumerate(rows):
        text = torch.cat((alone, got[row : row + 1, 40:], new[row : row + 1]), dim=1)
        assert torch.equal(again[row, 8:], greedy(plain, text, 40)[0, -40:])


@torch.no_grad()
def test_beam_search_on_left_padded_rows_equals_each_alone(gpt2):
    model, _, _ = gpt2
    rows, options = some_rows((5, 18)), {"num_beams": 3, "max_new_tokens": 40, "do_sample": False}
    ids, mask = padded(rows, "left")
    got = model.generate(ids.clamp(min=0), attention_mask=mask, **options)
    for row, alone in enumerate(rows):
        assert torch.equal(got[row, 18:], model.generate(alone, **options)[0, alone.shape[1] :])


ROWS_TAKEN = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([3, 0, 0, 2], dtype=torch.int32)), [3, 0, 0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select from the end": (lambda cache: cache.batch_select_indices(torch.tensor([-1, 0, -1])), [3, 0, 3]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True, False])), [0, 2]),
}


@pytest.mark.parametrize("lengths", [LENGTHS, (25, 25, 25, 25)], ids=["lanes", "one lane"])
@pytest.mark.parametrize(("take", "source"), ROWS_TAKEN.values(), ids=ROWS_TAKEN)
def test_rows_that_are_taken_go_on_as_what_they_were(gpt2, lengths, take, source):
    model, _, plain = gpt2
    rows, cache = some_rows(lengths), sinkattn.SinkCache(model)
    take(cache)  # does nothing to an empty cache
    feed_rows(model, cache, rows)
    take(cache)
    assert cache.batch_size == len(source)
    assert cache.seen.tolist() == [lengths[i] for i in source]
    # Copies of one row continue with different tokens.
    new = random_ids(len(source), 20, seed=8)
    got = torch.cat([feed(model, cache, part) for part in new.split([1, 1, 1, 17], dim=1)], dim=1)
    for row, i in enumerate(source):
        with torch.no_grad():
            want = oracle(plain, torch.cat((rows[i], new[row : row + 1]), dim=1))[0, -20:]
        assert rms_error(got[row], want) < 2e-6


def test_rows_that_are_taken_go_back_over_their_own_padding(gpt2):
    model, _, _ = gpt2
    cache = sinkattn.SinkCache(model)
    feed_rows(model, cache, some_rows((2, 7, 4)))
    cache.batch_select_indices(torch.tensor([1, 2, 1, 0]))
    assert cache.seen.tolist() == [7, 4, 7, 2]
    cache.crop(-4)
    assert cache.seen.tolist() == [3, 3, 3, 2]


@torch.no_grad()
def test_generate_goes_on_with_rows_that_were_taken(gpt2):
    """Also when `generate` is given all of their ids."""
    model, _, plain = gpt2
    cache, ids, source = sinkattn.SinkCache(model), random_ids(3, 25), torch.tensor([2, 0, 1])
    feed(model, cache, ids)
    cache.batch_select_indices(source)
    whole = torch.cat((ids[source], random_ids(3, 5, seed=6)), dim=1)
    got = model.generate(whole, cache=cache, max_new_tokens=20, do_sample=False)
    assert torch.equal(got, greedy(plain, whole, 20))


def test_rows_that_cannot_be_taken_are_refused(gpt2):
    model, _, _ = gpt2
    cache = sinkattn.SinkCache(model, max_batch_size=4)
    feed_rows(model, cache, some_rows())
    for indices in (torch.tensor([4]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(ValueError, match="indices: expected"):
            cache.batch_select_indices(indices)
    with pytest.raises(ValueError, match="beam_idx"):
        cache.reorder_cache(torch.tensor([0, 1]))
    with pytest.raises(IndexError):
        cache.reorder_cache(torch.tensor([0, 1, 2, 4]))
    assert cache.seen.tolist() == list(LENGTHS)
    with pytest.raises(ValueError, match="max_batch_size is 4, got 8 rows"):
        cache.batch_repeat_interleave(2)


def test_going_back_over_padding(gpt2):
    model, want, _ = gpt2
    rows, cache = some_rows(), sinkattn.SinkCache(model)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 1]])
    feed_rows(model, cache, [row[:, :n] for row, n in zip(rows, (0, 15, 40, 31), strict=True)])
    feed(model, cache, torch.full((4, 3), 5), mask)
    assert cache.seen.tolist() == [3, 17, 41, 32]
    feed(model, cache, torch.full((4, 1), 6))
    cache.crop(-3)
    assert (cache.seen.tolist(), cache.get_seq_length()) == ([1, 16, 41, 31], 41)
    cache.crop(-1)
    assert (cache.seen.tolist(), cache.get_seq_length()) == ([0, 15, 40, 31], 40)
    got = feed_rows(model, cache, [row[:, n:] for row, n in zip(rows, (0, 15, 40, 31), strict=True)])
    for row, n in enumerate((0, 15, 40, 31)):
        assert rms_error(got[row][0], want[row][n:]) < 2e-6


def test_how_far_back_a_stream_can_go(gpt2):
    model, want, _ = gpt2
    rows = some_rows()
    # No id has been dropped, so all tokens can be taken back, whatever the headroom.
    cache = sinkattn.SinkCache(model)
    feed_rows(model, cache, [row[:, :18] for row in rows])
    cache.crop(-18)
    assert cache.seen.tolist() == [0] * 4
    for row, got in enumerate(feed_rows(model, cache, rows)):
        assert rms_error(got[0], want[row]) < 2e-6
    # One row has dropped ids that it would need: no row is changed.
    cache = sinkattn.SinkCache(model)
    feed_rows(model, cache, [row[:, : min(length, 30)] for row, length in zip(rows, LENGTHS, strict=True)])
    with pytest.raises(RuntimeError, match=r"row 2 can roll back 9 tokens more \(headroom 4\), got 10"):
        cache.rollback(torch.tensor([0, 3, 10, 0]))
    assert cache.seen.tolist() == [3, 20, 30, 30]
    cache.rollback(torch.tensor([0, 3, 9, 0]))
    assert cache.seen.tolist() == [3, 17, 21, 30]
    got = feed_rows(model, cache, [row[:, n:] for row, n in zip(rows, (3, 17, 21, 30), strict=True)])
    for row, n in enumerate((3, 17, 21, 30)):
        assert rms_error(got[row][0], want[row][n:]) < 2e-6 or n == LENGTHS[row]


def test_columns_are_remembered_as_far_back_as_streams_can_go(gpt2):
    model, _, _ = gpt2
    cache, nothing = sinkattn.SinkCache(model), torch.zeros(2, 30, dtype=torch.int64)
    feed_rows(model, cache, some_rows((4, 8)))
    feed(model, cache, nothing, nothing)
    with pytest.raises(RuntimeError, match="can roll back 19 columns of a batch with padding, got 31"):
        cache.crop(-31)
    assert (cache.seen.tolist(), cache.get_seq_length()) == ([4, 8], 38)
    limit = max_ids(cache.layout)
    cache.crop(-limit)
    assert (cache.seen.tolist(), cache.get_seq_length()) == ([4, 8], 38 - limit)


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("run", range(5))
def test_an_interrupted_forward_counts_for_no_lane(gpt2, run, error):
    model, want, _ = gpt2
    rows, cache = some_rows(), sinkattn.SinkCache(model)
    before = (3, 15, 15, 33)
    feed_rows(model, cache, [row[:, :n] for row, n in zip(rows, before, strict=True)])
    with interrupted(model.transformer.h[1], run, error):
        feed_rows(model, cache, some_rows((9, 1, 30, 2)))
    assert (cache.seen.tolist(), cache.get_seq_length()) == (list(before), 33)
    got = feed_rows(model, cache, [row[:, n:] for row, n in zip(rows, before, strict=True)])
    for row in (1, 2):
        assert rms_error(got[row][0], want[row][before[row] :]) < 2e-6


@torch.no_grad()
def test_forks_and_pickles_of_several_lanes(gpt2):
    model, want, _ = gpt2
    rows, cache, file = some_rows(), sinkattn.SinkCache(model), io.BytesIO()
    feed_rows(model, cache, [row[:, :n] for row, n in zip(rows, (2, 15, 30, 31), strict=True)])
    fork = copy.deepcopy(cache)
    torch.save(cache, file)
    file.seek(0)
    for other in (fork, torch.load(file, weights_only=False), cache):
        assert other.seen.tolist() == [2, 15, 30, 31]
        got = feed_rows(model, other, [row[:, n:] for row, n in zip(rows, (2, 15, 30, 31), strict=True)])
        for row, n in enumerate((2, 15, 30, 31)):
            assert rms_error(got[row][0], want[row][n:]) < 2e-6


@pytest.mark.parametrize("lengths", [LENGTHS, (25, 25, 25, 25)], ids=["lanes", "one lane"])
def test_nothing_is_left_after_a_reset(gpt2, lengths):
    model, want, _ = gpt2
    cache = sinkattn.SinkCache(model)
    feed_rows(model, cache, some_rows(lengths))
    assert tensors_of(cache)
    cache.reset()
    assert tensors_of(cache) == []
    assert (cache.nbytes, cache.seen, cache.get_seq_length(), cache.has_padding) == (0, None, 0, False)
    got = feed_rows(model, cache, some_rows())
    for row, alone in enumerate(want):
        assert rms_error(got[row][0], alone) < 2e-6


def test_lanes_begun_in_inference_mode_go_on_outside(gpt2):
    model, want, _ = gpt2
    rows, cache = some_rows(), sinkattn.SinkCache(model)
    with torch.inference_mode():
        feed_rows(model, cache, [row[:, :n] for row, n in zip(rows, (2, 15, 15, 31), strict=True)])
        feed_rows(model, cache, [row[:, n : n + 1] for row, n in zip(rows, (2, 60, 15, 31), strict=True)])
        cache.reorder_cache(torch.arange(4))
        assert cache.seen.tolist() == [3, 15, 16, 32]
    got = feed_rows(model, cache, [row[:, n:] for row, n in zip(rows, (3, 15, 16, 32), strict=True)])
    for row, n in ((1, 15), (2, 16), (3, 32)):
        assert rms_error(got[row][0], want[row][n:]) < 2e-6


@torch.no_grad()
def test_memory_of_padded_rows_is_constant(gpt2):
    model, _, _ = gpt2
    cache, rows = sinkattn.SinkCache(model), some_rows((30, 42, 27))
    feed_rows(model, cache, rows)
    layers, heads, head_dim = 2, 4, 8
    states = 2 * layers * len(rows) * heads * (S + W) * head_dim * 4
    for i in range(100):
        feed(model, cache, random_ids(3, 1, seed=i))
        assert states < cache.nbytes <= states + len(rows) * max_ids(cache.layout) * 8
    assert cache.seen.tolist() == [130, 142, 127]
    assert len(tensors_of(cache)) <= 3 * (1 + 2 * layers) + 6  # ids, keys and values of each lane; the history


@torch.no_grad()
def test_masks_that_contradict_the_stream_are_refused(gpt2):
    model, _, _ = gpt2
    cache, (ids, mask) = sinkattn.SinkCache(model), padded(some_rows((10, 7)), "left")
    feed(model, cache, ids, mask)
    with pytest.raises(
        ValueError, match="attention_mask: expected 0 in row 1, column 0, as when that column was fed, got 1"
    ):
        feed(model, cache, ids[:, -1:], torch.ones(2, 11))
    longer = torch.cat((mask, mask[:, -1:]), dim=1)
    with pytest.raises(ValueError, match=r"position_ids: expected consecutive positions from \[10, 7\] on"):
        model(ids[:, -1:], attention_mask=longer, position_ids=torch.tensor([[10], [10]]), cache=cache)
    assert cache.seen.tolist() == [10, 7]
    model(ids[:, -1:], attention_mask=longer, position_ids=torch.tensor([[10], [7]]), cache=cache)
    assert cache.seen.tolist() == [11, 8]
    with pytest.raises(ValueError, match="holds 2 streams, got a batch of 3"):
        feed(model, cache, random_ids(3, 1))


@torch.no_grad()
@pytest.mark.parametrize("with_mask", [False, True])
def test_an_unpadded_batch_runs_what_it_needs_and_no_more(with_mask, monkeypatch):
    """Checks rows, tokens and first position of each forward of the decoder, which gets no mask."""
    model, ids, calls = sinkattn.enable(build("gpt2"), S, W), random_ids(2, 32), []
    patch = model._sinkattn

    def recorded(**kwargs):
        calls.append((tuple(kwargs["input_ids"].shape), kwargs["position_ids"][0, 0].item()))
        assert kwargs["attention_mask"] is None
        return type(patch).run_decoder(patch, **kwargs)

    monkeypatch.setattr(patch, "run_decoder", recorded)
    cache = sinkattn.SinkCache(model)
    for part in ids.split([10, 5, 1, 1, 15], dim=1):
        feed(model, cache, part, torch.ones(2, cache.get_seq_length() + part.shape[1]) if with_mask else None)
    layout = cache.layout
    assert (kept_tokens(layout), rebuild_period(layout)) == (6, 6)
    assert calls == [
        *(((2, 10), 0), ((2, 5), 10)),
        *(((2, 7), 3), ((2, 1), 10)),
        *(((2, 4), 11), ((2, 12), 3), ((2, 11), 3)),
    ]
    assert not cache.has_padding
    assert len(cache.lanes) == 1


@torch.no_grad()
def test_rows_with_as_many_tokens_share_their_forwards(gpt2):
    model, _, _ = gpt2
    cache, runs = sinkattn.SinkCache(model), []
    handle = model.transformer.wte.register_forward_hook(lambda module, args, output: runs.append(output.shape[:2]))
    feed(model, cache, *padded(some_rows((9, 14, 9, 14)), "within"))
    feed(model, cache, random_ids(4, 1))
    mask = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]])
    feed(model, cache, random_ids(4, 2), mask)
    handle.remove()
    assert runs == [(2, 9), (2, 14), (2, 1), (2, 1), (2, 1), (1, 7), (1, 8)]
    assert [lane.rows for lane in cache.lanes] == [[0, 2], [1], [3]]
