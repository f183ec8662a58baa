"""Fixtures of all tests: a fixed seed, uninitialised memory filled with NaN, and the demo model."""

import copy
import functools
import os
import sys

import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels on CPU tensors. Triton reads this variable when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Inductor compiles what little these tests compile in this process: its pool of processes would import torch again.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
torch.set_num_threads(1)  # for tensors this small, starting a second thread costs more than it saves


@pytest.fixture(autouse=True)
def same_start(monkeypatch):
    """Seed torch before each test, and unset the variable that overrides the backend."""
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
def poison_fresh_memory(request, monkeypatch):
    """Fill uninitialised memory that the package allocates with NaN, so that reading it is noticed.

    Not in tests that compile: Dynamo cannot trace it.
    """
    if "fresh_compiler" in request.fixturenames:
        return
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def shipped():
    """The model that ships with sinkattn, and its tokenizer."""
    from sinkattn.hf.load import load

    return load(device="cpu")


@pytest.fixture(scope="session")
def model(shipped):
    return shipped[0]


@pytest.fixture(scope="session")
def tokenizer(shipped):
    return shipped[1]


@pytest.fixture(scope="session")
def chat_model(shipped, tmp_path_factory):
    """A folder with the shipped model, a chat template, and the line break as its end of a reply."""
    model, tokenizer = (copy.deepcopy(each) for each in shipped)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}<s>{{ message.content }}\n"
        "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    )
    [model.generation_config.eos_token_id] = tokenizer("\n", add_special_tokens=False).input_ids
    folder = tmp_path_factory.mktemp("chat_model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def few_timed_tokens():
    """Time 4 tokens of each method at the end of an evaluation, not 200: no test judges these times."""
    from sinkattn.evaluate import perplexity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perplexity, "NUM_TIMED", 4)
        yield


def pytest_addoption(parser):
    parser.addoption(
        "--write-models-table",
        action="store_true",
        help="write docs/models.md from tests/hf/test_families.py",
    )
