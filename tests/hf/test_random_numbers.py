"""The random numbers of splitmix64: known values, uniform, and the same wherever they begin."""

import torch

from sinkattn.hf.sampling.random_numbers import Draws

CPU = torch.device("cpu")


def test_known_values():
    known = {
        1234567: [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431],
        0: [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC],
    }
    draws = Draws([*known], [0, 0], CPU)
    numbers = torch.stack([draws.integers() for _ in range(4)], dim=1).tolist()
    assert [[number % 2**64 for number in row] for row in numbers] == [*known.values()]


def test_a_generator_begins_anywhere_and_seeds_wrap_around():
    draws = Draws([3], [0], CPU)
    numbers = [float(draws.uniform()) for _ in range(30)]
    rows = Draws([3] * 30 + [3 - 2**64], [*range(30), 5], CPU).uniform().tolist()
    assert rows == [*numbers, numbers[5]]


def test_uniform():
    rows, columns = 2000, 100
    draws = Draws(range(rows), [0] * rows, CPU)
    numbers = torch.stack([draws.uniform() for _ in range(columns)], dim=1)
    assert numbers.dtype == torch.float64
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    counts = (numbers * 100).long().flatten().bincount(minlength=100).double()
    expected = rows * columns / 100
    # Chi-square with 99 degrees of freedom: 99 +- 14.
    assert 50 < float(((counts - expected) ** 2 / expected).sum()) < 150
    # Neither neighbours in a stream nor streams of neighbouring seeds have to do with each other.
    centred = numbers - 0.5
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred[1:, :-1] * centred[:-1, 1:]):
        assert abs(float(product.mean())) * 12 < 5 / product.numel() ** 0.5
