"""A websocket that feeds a text while the model speaks."""

import json
from contextlib import ExitStack

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from sinkattn.serve.limits import Limits


@pytest.fixture
def live(running):
    class Live:
        def __init__(self, id):
            self.socket = stack.enter_context(connect(f"{running.url.replace('http', 'ws')}/v1/sessions/{id}/live"))

        def say(self, **message):
            self.socket.send(json.dumps(message))

        def until(self, kind):
            """Text until a message of this kind, and that message."""
            text = ""
            while (message := json.loads(self.socket.recv(timeout=20)))["type"] != kind:
                assert message["type"] == "text", message
                text += message["text"]
            return text, message

    with ExitStack() as stack:
        yield Live


def test_text_goes_on_in_pieces(running, live):
    socket = live("live")
    socket.say(type="feed", text="import os\n")
    socket.say(type="feed", text="import sys\n")
    socket.say(type="generate", max_tokens=12, temperature=0)
    text, end = socket.until("end")
    assert (end["finish_reason"], end["usage"]["completion_tokens"]) == ("length", 12)
    tokenizer = running.server.tokenizer
    more = tokenizer("import sys\n", add_special_tokens=False).input_ids
    ids = [*tokenizer("import os\n").input_ids, *more]
    with running.server.pool.open(ids[:4]) as stream:
        stream.feed(ids[4:])
        assert running.server.tokenizer.decode([*stream.generate(12)]) == text
    socket.say(type="feed", text="x = 1\n")
    socket.say(type="generate", max_tokens=3)
    assert socket.until("end")[1]["usage"]["completion_tokens"] == 3


def test_feeding_while_it_speaks(running, live):
    socket = live("both")
    socket.say(type="feed", text="a")
    socket.say(type="generate", max_tokens=1000)
    assert json.loads(socket.socket.recv(timeout=20))["type"] == "text"
    for _ in range(5):
        socket.say(type="feed", text=" more")
    socket.say(type="generate", max_tokens=5)  # instead of what it says
    _, end = socket.until("end")
    assert end["usage"]["completion_tokens"] == 5
    socket.say(type="generate", max_tokens=1000)
    json.loads(socket.socket.recv(timeout=20))
    socket.say(type="stop")
    socket.socket.close()
    running.wait_until(lambda: running.server.num_at_work == 0)
    assert running.http.get("/v1/sessions/both").json()["tokens"] > 12


def test_errors_leave_it_open(live):
    socket = live("errors")
    socket.say(type="feed", text="a")
    for message, expected in (
        ({"type": "other"}, "other"),
        ({"type": "feed"}, "text"),
        ({"type": "generate", "max_tokens": 10**9}, "max_tokens"),
        ({"type": "generate", "temperature": "x"}, "temperature"),
    ):
        socket.say(**message)
        assert expected in socket.until("error")[1]["error"]["message"]
    socket.socket.send("{")
    assert socket.until("error")
    socket.say(type="generate", max_tokens=2)
    assert socket.until("end")


def test_it_begins_with_text(live):
    socket = live("none")
    socket.say(type="generate")
    assert "feed" in socket.until("error")[1]["error"]["message"]


def test_one_that_says_nothing_is_closed(make_server, run_server):
    with run_server(make_server(limits=Limits(idle_seconds=0.3))) as running:
        with connect(f"{running.url.replace('http', 'ws')}/v1/sessions/idle/live") as socket:
            socket.send(json.dumps({"type": "feed", "text": "a"}))
            with pytest.raises(ConnectionClosed):
                socket.recv(timeout=20)
        running.wait_until(lambda: running.server.num_at_work == 0)


def test_pages_of_other_sites_are_refused(running):
    url = f"{running.url.replace('http', 'ws')}/v1/sessions/site/live"
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, origin="https://example.com").__enter__()
    with connect(url, origin=running.url) as socket:
        socket.send(b"bytes")
        assert "bytes" in json.loads(socket.recv(timeout=20))["error"]["message"]
