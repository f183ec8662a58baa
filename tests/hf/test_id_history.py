"""What a cache remembers of the ids it was fed, against a list of all of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkattn.hf.cache.id_history import FIRST, UNKNOWN, IdHistory, common_tokens, is_token

ROWS, CAPACITY = 2, 12


@st.composite
def calls(draw):
    """Calls of several sizes with and without padding, and columns taken back."""
    sizes = st.sampled_from([1, 1, 1, 2, 5, CAPACITY - 1, CAPACITY, CAPACITY + 1, 3 * CAPACITY, FIRST])
    return draw(st.lists(st.tuples(sizes, st.booleans(), st.integers(0, 3), st.integers(0, 2**31)), max_size=30))


@given(calls())
@settings(max_examples=200, deadline=None)
def test_it_knows_what_was_fed(calls):
    history, columns = IdHistory(CAPACITY), torch.zeros(ROWS, 0, dtype=torch.int64)
    furthest, furthest_tokens = 0, [0] * ROWS
    for size, padded, back, seed in calls:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 9, (ROWS, size), generator=generator)
        present = torch.rand(ROWS, size, generator=generator) < 0.7 if padded else None
        history.record(columns.shape[1], (columns >= 0).sum(dim=1), ids, present)
        columns = torch.cat((columns, ids if present is None else torch.where(present, ids, ~ids)), dim=1)
        furthest = max(furthest, columns.shape[1])
        furthest_tokens = [
            max(before, int((row >= 0).sum())) for before, row in zip(furthest_tokens, columns, strict=True)
        ]
        if seed % 5 == 0:
            index = torch.tensor([1, seed % 2])
            history.take_rows(index)
            columns, furthest_tokens = columns[index], [furthest_tokens[i] for i in index]
        columns = columns[:, : max(0, columns.shape[1] - back)]
        end = columns.shape[1]
        tokens = [row[row >= 0] for row in columns]
        for row, (numbers, known) in enumerate(history.known_tokens([len(row) for row in tokens])):
            oldest = furthest_tokens[row] - CAPACITY
            want = [i for i in range(len(tokens[row])) if i < FIRST or i >= oldest]
            assert numbers.tolist() == want
            assert torch.equal(known, tokens[row][want])
        assert history.oldest == max(0, furthest - CAPACITY)
        for begin in (end, end - 1, history.oldest, history.oldest - 1):
            if 0 <= begin <= end:
                got = history.present(begin, end)
                assert (got is None) == (begin < history.oldest)
                assert got is None or torch.equal(got, columns[:, begin:] >= 0)
        if history.padded:
            assert torch.equal(history.known_columns(end), columns[:, history.oldest :])


@given(st.integers(0, 2**31), st.integers(0, 20), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_common_tokens(seed, seen, tokens):
    generator = torch.Generator().manual_seed(seed)
    stream, ids = (torch.randint(0, 5, (n,), generator=generator) for n in (seen, tokens))
    ids[: seen // 2] = stream[: min(seen // 2, tokens)][: len(ids[: seen // 2])]
    numbers = torch.arange(seen)[torch.rand(seen, generator=generator) < 0.8]
    want = next((i for i in numbers.tolist() if i >= tokens or ids[i] != stream[i]), seen)
    assert common_tokens(numbers, stream[numbers], seen, ids) == min(want, seen, tokens)


def test_embeddings_are_like_no_id():
    history = IdHistory(CAPACITY)
    history.record(0, torch.zeros(1, dtype=int), torch.tensor([[5, UNKNOWN, 7, -1]]), torch.tensor([[1, 1, 0, 0]]) > 0)
    ((numbers, known),) = history.known_tokens([2])
    assert known.tolist() == [5, UNKNOWN]
    assert is_token(history.known_columns(4)).tolist() == [[True, True, False, False]]
    assert common_tokens(numbers, known, 2, torch.tensor([5, 6, 7])) == 1


def test_columns_are_numbered_anew():
    history, ones = IdHistory(CAPACITY), torch.ones(1, 3, dtype=torch.bool)
    ids = torch.tensor([[1, 2, 3]])
    history.record(0, torch.zeros(1, dtype=int), ids)
    history.renumber_columns(ids, ones)
    assert not history.padded
    shifted = torch.tensor([[9, 1, 2, 3]])
    history.renumber_columns(shifted, shifted != 9)
    assert history.known_columns(4).tolist() == [[~9, 1, 2, 3]]
    assert history.known_tokens([3])[0][1].tolist() == [1, 2, 3]
    history.record(
        4, torch.tensor([3]), torch.tensor([[4, 5]]), before=torch.tensor([[True, False]]), present=ones[:, 1:]
    )
    history.record_columns(6, torch.tensor([[7]]), ~ones[:, :1])
    assert history.known_columns(7).tolist() == [[~9, 1, 2, 3, 4, 5, ~7]]


def test_rows_and_forgetting():
    history, none = IdHistory(CAPACITY), torch.zeros(2, dtype=torch.int64)
    history.take_rows(torch.tensor([0, 0]))  # of nothing
    history.record(0, none, torch.tensor([[1, 2], [3, 4]]))
    history.take_rows(torch.tensor([1, 1, 0]))
    assert [ids.tolist() for _, ids in history.known_tokens([2, 2, 2])] == [[3, 4], [3, 4], [1, 2]]
    history.clear()
    history.record(0, none[:1], torch.tensor([[9]]))
    assert history.known_tokens([1])[0][1].tolist() == [9]
    assert history.oldest == 0


@pytest.mark.parametrize("begin", [0, FIRST - 1, 5 * CAPACITY])
def test_columns_on_the_device_say_the_same(begin):
    ids, seen = torch.arange(CAPACITY).view(1, -1), torch.tensor([begin])
    history, traced = IdHistory(CAPACITY), IdHistory(CAPACITY)
    history.record(begin, seen, ids)
    traced.record(begin, seen, ids, index=begin + torch.arange(CAPACITY))
    assert torch.equal(history.recent, traced.recent)
    assert torch.equal(history.first[:, :FIRST], traced.first[:, :FIRST])
