"""`IdHistory` against a list of all ids that it was fed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkattn.hf.cache.id_history import MAX_PREFIX_IDS, UNKNOWN_ID, IdHistory, common_prefix_length, is_token

ROWS, CAPACITY = 2, 12


@st.composite
def calls(draw):
    """Calls of several sizes, with and without padding, each followed by a rollback of some columns."""
    sizes = st.sampled_from([1, 1, 1, 2, 5, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY, MAX_PREFIX_IDS])
    return draw(st.lists(st.tuples(sizes, st.booleans(), st.integers(0, 3), st.integers(0, 2**31)), max_size=30))


@given(calls())
@settings(max_examples=200, deadline=None)
def test_it_knows_what_was_fed(calls):
    history, columns = IdHistory(CAPACITY), torch.zeros(ROWS, 0, dtype=torch.int64)
    peak_columns, peak_tokens = 0, [0] * ROWS
    for size, padded, num_rollback, seed in calls:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 9, (ROWS, size), generator=generator)
        token_mask = torch.rand(ROWS, size, generator=generator) < 0.7 if padded else None
        history.record(columns.shape[1], (columns >= 0).sum(dim=1), ids, token_mask)
        columns = torch.cat((columns, ids if token_mask is None else torch.where(token_mask, ids, ~ids)), dim=1)
        peak_columns = max(peak_columns, columns.shape[1])
        peak_tokens = [max(before, int((row >= 0).sum())) for before, row in zip(peak_tokens, columns, strict=True)]
        if seed % 5 == 0:
            index = torch.tensor([1, seed % 2])
            history.take_rows(index)
            columns, peak_tokens = columns[index], [peak_tokens[i] for i in index]
        columns = columns[:, : max(0, columns.shape[1] - num_rollback)]
        end = columns.shape[1]
        tokens = [row[row >= 0] for row in columns]
        for row, (numbers, known) in enumerate(history.known_tokens([len(row) for row in tokens])):
            oldest = peak_tokens[row] - CAPACITY
            want = [i for i in range(len(tokens[row])) if i < MAX_PREFIX_IDS or i >= oldest]
            assert numbers.tolist() == want
            assert torch.equal(known, tokens[row][want])
        assert history.oldest_column == max(0, peak_columns - CAPACITY)
        for begin in (end, end - 1, history.oldest_column, history.oldest_column - 1):
            if 0 <= begin <= end:
                got = history.token_mask(begin, end)
                assert (got is None) == (begin < history.oldest_column)
                assert got is None or torch.equal(got, columns[:, begin:] >= 0)
        if history.has_padding:
            assert torch.equal(history.known_columns(end), columns[:, history.oldest_column :])


@given(st.integers(0, 2**31), st.integers(0, 20), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_common_tokens(seed, seen, tokens):
    generator = torch.Generator().manual_seed(seed)
    stream, ids = (torch.randint(0, 5, (n,), generator=generator) for n in (seen, tokens))
    ids[: seen // 2] = stream[: min(seen // 2, tokens)][: len(ids[: seen // 2])]
    numbers = torch.arange(seen)[torch.rand(seen, generator=generator) < 0.8]
    want = next((i for i in numbers.tolist() if i >= tokens or ids[i] != stream[i]), seen)
    assert common_prefix_length(numbers, stream[numbers], seen, ids) == min(want, seen, tokens)


def test_embeddings_are_like_no_id():
    history = IdHistory(CAPACITY)
    history.record(
        0, torch.zeros(1, dtype=int), torch.tensor([[5, UNKNOWN_ID, 7, -1]]), torch.tensor([[1, 1, 0, 0]]) > 0
    )
    ((numbers, known),) = history.known_tokens([2])
    assert known.tolist() == [5, UNKNOWN_ID]
    assert is_token(history.known_columns(4)).tolist() == [[True, True, False, False]]
    assert common_prefix_length(numbers, known, 2, torch.tensor([5, 6, 7])) == 1


def test_columns_are_numbered_anew():
    history, ones = IdHistory(CAPACITY), torch.ones(1, 3, dtype=torch.bool)
    ids = torch.tensor([[1, 2, 3]])
    history.record(0, torch.zeros(1, dtype=int), ids)
    history.renumber_columns(ids, ones)
    assert not history.has_padding
    shifted = torch.tensor([[9, 1, 2, 3]])
    history.renumber_columns(shifted, shifted != 9)
    assert history.known_columns(4).tolist() == [[~9, 1, 2, 3]]
    assert history.known_tokens([3])[0][1].tolist() == [1, 2, 3]
    history.record(
        4, torch.tensor([3]), torch.tensor([[4, 5]]), already_fed=torch.tensor([[True, False]]), token_mask=ones[:, 1:]
    )
    history.record_columns(6, torch.tensor([[7]]), ~ones[:, :1])
    assert history.known_columns(7).tolist() == [[~9, 1, 2, 3, 4, 5, ~7]]


def test_rows_and_forgetting():
    history, none = IdHistory(CAPACITY), torch.zeros(2, dtype=torch.int64)
    history.take_rows(torch.tensor([0, 0]))  # of an empty history
    history.record(0, none, torch.tensor([[1, 2], [3, 4]]))
    history.take_rows(torch.tensor([1, 1, 0]))
    assert [ids.tolist() for _, ids in history.known_tokens([2, 2, 2])] == [[3, 4], [3, 4], [1, 2]]
    history.clear()
    history.record(0, none[:1], torch.tensor([[9]]))
    assert history.known_tokens([1])[0][1].tolist() == [9]
    assert history.oldest_column == 0


@pytest.mark.parametrize("begin", [0, MAX_PREFIX_IDS - 1, 5 * CAPACITY])
def test_columns_on_the_device_say_the_same(begin):
    ids, seen = torch.arange(CAPACITY).view(1, -1), torch.tensor([begin])
    history, traced = IdHistory(CAPACITY), IdHistory(CAPACITY)
    history.record(begin, seen, ids)
    traced.record(begin, seen, ids, column_index=begin + torch.arange(CAPACITY))
    assert torch.equal(history.recent_ids, traced.recent_ids)
    assert torch.equal(history.prefix_ids[:, :MAX_PREFIX_IDS], traced.prefix_ids[:, :MAX_PREFIX_IDS])
