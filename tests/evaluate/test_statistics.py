"""Means over blocks: their sums against NumPy, their intervals against how often they hold the truth."""

import math

import numpy as np
import pytest

from sinkattn.evaluate.statistics import Blocks, Sums


def test_sums_are_those_of_each_stretch():
    sums = Sums(np.array([10, 20, 25, 50]))
    losses = np.arange(60.0)
    losses[12] = math.nan
    for begin in range(0, 60, 7):
        sums.add(begin, losses[begin : begin + 7])
    means = {begin: (end, count, mean) for begin, end, count, mean in sums.means()}
    assert means == {10: (20, 9, np.nanmean(losses[10:20])), 20: (25, 5, 22.0), 25: (50, 25, 37.0)}


def test_mean_is_over_all_that_counts():
    blocks = Blocks(100, 1100)
    values = np.random.default_rng(0).normal(size=1200)
    blocks.add(0, values)
    mean = blocks.mean()
    assert mean.tokens == 1000
    assert mean.loss == pytest.approx(values[100:1100].mean(), abs=1e-12)
    assert mean.perplexity == pytest.approx(math.exp(mean.loss))


@pytest.mark.parametrize(("correlation", "length"), [(0.0, 4000), (0.8, 4000), (0.0, 300), (0.8, 1000)])
def test_intervals_hold_the_true_mean_as_often_as_they_say(correlation, length):
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(400):
        noise = rng.normal(size=length)
        for i in range(1, length):
            noise[i] += correlation * noise[i - 1]
        blocks = Blocks(0, length)
        blocks.add(0, 3.0 + noise)
        mean = blocks.mean()
        held += abs(mean.loss - 3.0) < mean.margin
    assert 0.905 < held / 400 < 0.985


def test_a_difference_is_surer_than_its_parts():
    rng = np.random.default_rng(2)
    common = rng.normal(size=2000)
    one, other = Blocks(0, 2000), Blocks(0, 2000)
    one.add(0, 2 + common)
    other.add(0, 1.9 + common + 0.01 * rng.normal(size=2000))
    difference = one.difference(other)
    assert difference.loss == pytest.approx(0.1, abs=2e-3)
    assert difference.margin < 2e-3 < one.mean().margin
    with pytest.raises(ValueError, match="same positions"):
        one.difference(Blocks(0, 2000))


def test_too_few_tokens_have_no_interval_and_none_no_mean():
    few = Blocks(0, 200)
    assert few.mean() is None
    few.add(0, np.ones(200))
    assert few.mean().margin is None


def test_blocks_begin_at_multiples_of_a_unit():
    edges = Blocks(512, 512 + 10_000, 256).edges
    assert (edges[0], edges[-1], len(edges)) == (512, 10_512, 33)
    assert not ((edges[:-1] - 512) % 256).any()
    assert set(np.diff(edges)[:-1]) == {256, 512}
    assert Blocks(0, 600, 256).edges.tolist() == [0, 256, 600]
    assert Blocks(0, 100, 256).edges.tolist() == [0, 100]


def test_joined_blocks_are_those_of_their_parts():
    rng, parts, whole = np.random.default_rng(0), [], Blocks(0, 5_000)
    for begin in range(0, 5_000, 1_000):
        losses = rng.normal(size=1_000)
        parts.append(Blocks(begin, begin + 1_000))
        parts[-1].add(begin, losses)
        whole.add(begin, losses)
    joined = Blocks.join(parts)
    assert (len(joined.sums), joined.edges[0], joined.edges[-1]) == (32, 0, 5_000)
    assert joined.mean().tokens == 5_000
    assert joined.mean().loss == pytest.approx(whole.mean().loss)
    assert joined.mean().margin == pytest.approx(whole.mean().margin, rel=0.5)
    for begin, end, count, mean in joined.means():
        inside = [each for part in parts for each in part.means() if begin <= each[0] and each[1] <= end]
        assert count == sum(each[2] for each in inside)
        assert mean == pytest.approx(sum(each[2] * each[3] for each in inside) / count)
    assert [len(Blocks.join(parts[:1]).sums), len(Blocks.join([Blocks(0, 40), Blocks(40, 80)]).sums)] == [31, 2]
