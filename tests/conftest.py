"""Fixtures of all tests: one seed, and fresh memory that is never quietly zero."""

import functools
import os
import sys

import pytest
import torch

# Triton reads this when it is first imported: where there is no GPU its interpreter runs the kernels, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # the tensors are tiny: a second thread costs far more than it brings


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Every test draws the same numbers and chooses its backend itself, whatever ran or was set before it."""
    torch.manual_seed(0)
    monkeypatch.delenv("SINKATTN_BACKEND", raising=False)


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "sinkattn" and out.is_floating_point():
            out.fill_(torch.nan)
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch):
    """Fill with NaN what the package allocates without a value, so that nothing unwritten is read unnoticed."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def pytest_addoption(parser):
    parser.addoption("--write-models-table", action="store_true", help="write docs/models.md from what the tests find")
