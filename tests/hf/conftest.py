import pytest
import torch
from continued import FedTokenCounter
from hf_models import ROTARY


@pytest.fixture(params=ROTARY)
def family(request) -> str:
    return request.param


@pytest.fixture
def count_fed():
    """Make a `FedTokenCounter` of a model, and remove its hook after the test."""
    made = []
    yield lambda model: made.append(FedTokenCounter(model)) or made[-1]
    for fed in made:
        fed.hook.remove()


@pytest.fixture
def fresh_compiler():
    """For tests that compile: no graphs of earlier tests, and counters at zero."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
