from functools import partial

import pytest
from chat_models import CHATML, with_template
from tiny_server import running_server, tiny_server

from sinkattn.hf.load import load


@pytest.fixture(scope="session")
def chat_tokenizer():
    return with_template(load()[1], CHATML)


@pytest.fixture(scope="session")
def make_server(chat_tokenizer):
    return partial(tiny_server, chat_tokenizer)


@pytest.fixture(scope="session")
def run_server():
    return running_server


@pytest.fixture(scope="module")
def running(make_server):
    with running_server(make_server()) as running:
        yield running
