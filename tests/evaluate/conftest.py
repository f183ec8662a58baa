"""The shipped model, whose figures the tests know, and a stream of its held-out text."""

from itertools import islice

import pytest
import torch

from sinkattn.evaluate.text import StandardLibrary, TokenStream
from sinkattn.hf.load import load


@pytest.fixture(scope="session")
def shipped():
    return load(device="cpu")


@pytest.fixture(scope="session")
def model(shipped):
    return shipped[0]


@pytest.fixture(scope="session")
def tokenizer(shipped):
    return shipped[1]


@pytest.fixture
def stream(tokenizer):
    return TokenStream(StandardLibrary(), tokenizer)


@pytest.fixture(scope="session")
def ids(tokenizer):
    """The first 2,001 tokens of that stream."""
    return torch.tensor(list(islice(TokenStream(StandardLibrary(), tokenizer), 2001)))
