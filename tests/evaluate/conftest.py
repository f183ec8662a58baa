"""Held-out text of the model that ships with sinkattn."""

from itertools import islice

import pytest
import torch

from sinkattn.evaluate.text import StandardLibrary, TokenStream


@pytest.fixture
def stream(tokenizer):
    return TokenStream(StandardLibrary(), tokenizer)


@pytest.fixture(scope="session")
def ids(tokenizer):
    """The first 2,001 tokens of that stream."""
    return torch.tensor(list(islice(TokenStream(StandardLibrary(), tokenizer), 2001)))
