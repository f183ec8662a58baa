"""Keys and limits."""

import contextlib
import json
import socket
import threading

import httpx
import openai
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from sinkattn.serve.access import Keys
from sinkattn.serve.errors import ApiError
from sinkattn.serve.limits import Limits

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def guarded(make_server, run_server):
    limits = Limits(body_bytes=2000, max_tokens=1000, requests=4)
    with run_server(make_server(keys=Keys({"a": "first key", "b": "second key"}), limits=limits)) as running:
        yield running


@pytest.mark.parametrize("header", [None, "", "first key", "Bearer", "Bearer first", "Basic first key", "Bearer x y"])
def test_wrong_keys(header):
    with pytest.raises(ApiError, match="Authorization") as caught:
        Keys({"a": "first key"}).owner(header)
    assert caught.value.status == 401
    assert Keys({"a": "first key"}).owner("Bearer first key") == "a"


def test_every_route_but_health_needs_a_key(guarded):
    paths = guarded.http.get("/openapi.json").json()["paths"]
    assert len(paths) > 10
    for path, methods in paths.items():
        for method in methods:
            url = path.replace("{id}", "x").replace("{name}", "tiny")
            status = guarded.http.request(method.upper(), url, json=BODY).status_code
            assert status == (200 if path in ("/", "/health", "/ready") else 401), path


def test_a_client_sees_its_own_sessions(guarded):
    guarded.chat("Secret of a", key="first key", session_id="s")
    guarded.chat("Other", key="second key", session_id="s")
    mine, other = (guarded.client(key) for key in ("first key", "second key"))
    assert [x["id"] for x in mine.get("/sessions", cast_to=httpx.Response).json()["data"]] == ["s"]
    reply = guarded.chat("Secret of a", key="second key")  # the same words continue no stream of another client
    assert not reply.usage.prompt_tokens_details.cached_tokens
    other.delete("/sessions/s", cast_to=httpx.Response)
    assert mine.get("/sessions/s", cast_to=httpx.Response).json()["tokens"]
    with pytest.raises(openai.NotFoundError):
        other.get("/sessions/s", cast_to=httpx.Response)


def test_large_bodies(guarded):
    header = {"Authorization": "Bearer first key"}
    large = json.dumps({**BODY, "user": "x" * 3000}).encode()
    for content in (large, iter([large[:1000], large[1000:]])):  # with and without a length
        response = guarded.http.post("/v1/chat/completions", content=content, headers=header)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
    assert guarded.http.post("/v1/chat/completions", json=BODY, headers=header).status_code == 200


def test_a_busy_client_leaves_places_to_others(guarded):
    """The third request of it is refused, and that of another one is not; who goes away frees a place."""
    with contextlib.ExitStack() as stack:
        for name in "xy":
            events = guarded.chat("Go on", key="first key", session_id=name, max_tokens=1000, stream=True)
            stack.callback(events.close)
            next(events)
        with pytest.raises(openai.RateLimitError, match="2 requests are at work, 2 of this client") as caught:
            guarded.chat("Third", key="first key")
        assert caught.value.response.headers["Retry-After"] == "1"
        assert guarded.chat("Third", key="second key").choices
    guarded.wait_until(lambda: guarded.server.num_at_work == 0)
    assert guarded.chat("Third", key="first key").choices


def test_a_client_that_goes_away_frees_its_stream(guarded):
    """While it waits for a whole reply, and while it reads events; the session goes on afterwards."""
    for stream in (False, True):
        session = (
            guarded.server.sessions.named("a", "left") if ("a", "left") in guarded.server.sessions._sessions else None
        )
        before = 0 if session is None else session.num_tokens
        body = json.dumps({**BODY, "max_tokens": 1000, "session_id": "left", "stream": stream}).encode()
        address = httpx.URL(guarded.url)
        with socket.create_connection((address.host, address.port)) as connection:
            head = (
                "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer first key\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)
            guarded.wait_until(lambda: guarded.server.num_at_work == 1)
            guarded.wait_until(lambda: ("a", "left") in guarded.server.sessions._sessions)
            session = guarded.server.sessions._sessions["a", "left"]
            guarded.wait_until(lambda session=session, before=before: session.num_tokens > before + 30)
        guarded.wait_until(lambda: guarded.server.num_at_work == 0)
        assert session.num_tokens < 900
        state = session.content.stream._state
        assert state.generation is None
    assert guarded.chat("And?", key="first key", session_id="left", append=True).choices


def test_many_clients_leave_nothing_behind(guarded):
    def leave(index):
        with contextlib.suppress(openai.APIError):
            events = guarded.chat(f"Client {index}", key="first key", max_tokens=500, stream=True)
            next(events)
            events.close()

    threads = [threading.Thread(target=leave, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guarded.wait_until(lambda: guarded.server.num_at_work == 0)
    assert all(not session.is_used for session in guarded.server.sessions.of("a"))
    assert len(guarded.server.pool) == len(guarded.server.sessions)


def test_metrics_and_health(guarded):
    assert guarded.http.get("/health").json() == {"status": "ok"}
    text = guarded.http.get("/metrics", headers={"Authorization": "Bearer first key"}).text
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(figures["sinkattn_generated_tokens_total"]) > 0
    assert float(figures["sinkattn_time_to_first_token_seconds_count"]) > 0
    assert float(figures["sinkattn_sessions"]) == len(guarded.server.sessions)
    assert float(figures['sinkattn_requests_total{path="/health",status="200"}']) > 0
    assert "Secret" not in text


def figure(running, name):
    lines = running.http.get("/metrics").text.splitlines()
    return next((float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name} ")), 0)


def test_rows_in_use(running):
    """Those of streams that run, not of idle ones; and requests at work, those for a session among them."""
    names = ("sinkattn_rows", "sinkattn_rows_in_use", "sinkattn_requests_at_work")
    for name in "abc":
        running.chat("One", session_id=name)
    running.wait_until(lambda: [figure(running, name) for name in names] == [8, 0, 0])
    with contextlib.ExitStack() as stack:
        for name in "ab":
            events = running.chat("Go on", session_id=name, max_tokens=4000, stream=True)
            stack.callback(events.close)
            next(x for x in events if x.choices[0].delta.content)
        assert [figure(running, name) for name in names] == [8, 2, 2]
        waiting = threading.Thread(target=running.http.get, args=("/v1/sessions/a",))
        waiting.start()
        running.wait_until(lambda: figure(running, names[2]) == 3)
        assert figure(running, names[1]) == 2
    waiting.join()
    running.wait_until(lambda: [figure(running, name) for name in names] == [8, 0, 0])


def test_every_route_is_counted(running):
    """By its path and status: those of sessions, and websockets."""

    def counted(path, status):
        return figure(running, f'sinkattn_requests_total{{path="{path}",status="{status}"}}')

    path, live = "/v1/sessions/{id}", "/v1/sessions/{id}/live"
    before = [counted(path, 404), counted("/v1/sessions", 200), counted(live, 101), counted(live, 403)]
    running.http.get("/v1/sessions/none")
    running.http.get("/v1/sessions")
    url = f"{running.url.replace('http', 'ws')}/v1/sessions/none/live"
    with connect(url) as socket:
        socket.send("nonsense")
        socket.recv(timeout=20)
    with pytest.raises(InvalidStatus, match="403"):
        connect(url, origin="https://example.com").__enter__()
    running.wait_until(lambda: counted(live, 101) > before[2])
    after = [counted(path, 404), counted("/v1/sessions", 200), counted(live, 101), counted("other", 403)]
    assert after == [x + 1 for x in before]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("host.docker.internal:1", 200),
        ("example.com", 403),
        ("localhost.example.com:80", 403),
        ("[", 403),
    ],
)
def test_public_names_are_refused_without_keys(running, guarded, host, status):
    """Else a page of that name could use the server by the browser of somebody on this machine."""
    response = running.http.get("/v1/models", headers={"Host": host})
    assert response.status_code == status
    assert guarded.http.get("/v1/models", headers={"Host": host}).status_code == 401
    assert guarded.http.get("/v1/models", headers={"Host": host}).headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("origin", "status"), [("http://evil.example", 403), ("null", 403), ("http://", 403), ("app://editor", 404)]
)
def test_simple_requests_of_other_sites_are_refused_without_keys(running, guarded, origin, status):
    header = {"Origin": origin}
    assert running.http.post("/v1/sessions/none/save", headers=header).status_code == status
    assert running.http.get("/v1/models", headers={"Origin": running.url}).status_code == 200
    assert guarded.http.post("/v1/sessions/none/save", headers=header).status_code == 401
