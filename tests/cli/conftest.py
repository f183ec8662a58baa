"""The model that ships with sinkattn."""

import pytest

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
