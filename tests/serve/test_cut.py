"""What a client gets whose events are cut, as the server ends."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from sse_starlette.sse import AppStatus

from sinkattn.serve import events

HELLO = [{"role": "user", "content": "Hello"}]
BODIES = {
    "chat/completions": {"messages": HELLO, "max_tokens": 4000},
    "completions": {"prompt": "Hello", "max_tokens": 4000},
    "responses": {"input": "Hello", "max_output_tokens": 4000},
}


@pytest.fixture
def read(running, monkeypatch):
    """Data of the events of a request during which the server is asked to end, after some of them."""

    def read(path, *, cut_after=0.1, num_before=8, **fields):
        monkeypatch.setattr(events, "CUT_AFTER", cut_after)
        body, lines = {"model": "tiny", "stream": True, "temperature": 0, **BODIES[path], **fields}, []
        with running.http.stream("POST", f"/v1/{path}", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    lines.append(line.removeprefix("data: "))
                    if len(lines) == num_before:
                        monkeypatch.setattr(AppStatus, "should_exit", True)
        running.wait_until(lambda: running.server.num_at_work == 0)
        monkeypatch.undo()
        return lines

    return read


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_events_that_are_cut_end_with_an_error(running, read, path):
    *lines, error, done = read(path, session_id="cut")
    assert len(lines) >= 8
    assert done == "[DONE]"
    error = json.loads(error)["error"]
    assert (error["type"], error["code"]) == ("server_error", "shutting_down")
    texts = [json.loads(line)["choices"][0] for line in lines]
    text = "".join(x["text"] if "text" in x else x["delta"]["content"] for x in texts)
    assert text
    assert not any(x["finish_reason"] for x in texts)
    # The session goes on after what the client has got.
    [session] = [x for x in running.server.sessions.of("") if x.id == "cut"]
    assert session.reply.startswith(text)
    assert session.content.stream._state.generation is None
    running.http.delete("/v1/sessions/cut").raise_for_status()


def test_events_of_a_response_end_with_its_own_error(read):
    *lines, error = [json.loads(line) for line in read("responses")]
    assert (error["type"], error["code"], error["param"]) == ("error", "shutting_down", None)
    assert "shutting down" in error["message"]
    assert [x["sequence_number"] for x in (*lines, error)] == [*range(len(lines) + 1)]


def test_a_step_that_takes_long_is_not_waited_for(running, read, monkeypatch):
    engine, go_on = running.server.pool.scheduler.engine, threading.Event()
    run = engine.run

    def slow(segments):
        assert go_on.wait(20)
        run(segments)

    running.wait_until(lambda: not running.server.sessions._catching_up._tasks)  # they run steps, too
    monkeypatch.setattr(engine, "run", slow)
    lines = read("chat/completions", num_before=1)  # before there is any token
    go_on.set()
    assert len(lines) == 3
    assert lines[2] == "[DONE]"


def test_a_reply_that_ends_in_time_is_whole(read):
    lines = read("chat/completions", cut_after=20, max_tokens=12, num_before=2)
    assert json.loads(lines[-2])["choices"][0]["finish_reason"] == "length"


def test_a_response_that_fails_ends_with_its_own_error(running, monkeypatch):
    def fail(segments):
        raise RuntimeError("secret words of the device")

    monkeypatch.setattr(running.server.pool.scheduler.engine, "run", fail)
    *_, event = running.client().responses.create(model="tiny", input="Hello", stream=True)
    assert (event.type, event.code) == ("error", "server_error")
    assert "secret" not in event.message


@pytest.mark.parametrize("path", BODIES)
def test_a_whole_answer_that_takes_too_long_is_an_error_of_openai(make_server, run_server, tmp_path, path):
    body = {"model": "tiny", "temperature": 0, "session_id": "whole", **BODIES[path]}
    with run_server(make_server(folder=tmp_path), ends_within=0.1) as running, ThreadPoolExecutor() as threads:
        asked = threads.submit(httpx.post, f"{running.url}/v1/{path}", json=body, timeout=30)
        running.wait_until(lambda: any(x.reply for x in running.server.sessions.of("")))
        running.end()
        answer = asked.result()
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert answer.json()["error"]["code"] == "shutting_down"
    [saved] = tmp_path.glob("*.safetensors")
    assert saved.stat().st_size
