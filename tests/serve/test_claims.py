"""Servers that share a folder of sessions: a session is at one of them at a time."""

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time

import openai
import pytest

from sinkattn.serve.claims import Claims
from sinkattn.serve.store import Store


@pytest.fixture
def two(tmp_path):
    return Claims(tmp_path / "claims"), Claims(tmp_path / "claims")


def claim(claims, name="a", seconds=0.0):
    return asyncio.run(claims.claim(name, seconds))


def test_one_at_a_time(two):
    first, second = two
    assert claim(first)
    assert claim(first)  # again
    assert not claim(second)
    assert (first.is_elsewhere("a"), second.is_elsewhere("a")) == (False, True)
    assert (first.is_elsewhere("b"), "a" in first, "a" in second) == (False, True, False)
    assert claim(second, "b")
    first.release("a", forget=False)
    assert not second.is_elsewhere("a")
    assert claim(second)
    assert not claim(first)


@pytest.mark.parametrize("forget", [False, True])
def test_what_is_wanted_is_told(two, forget):
    first, second = two
    claim(first)
    assert not first.wanted()

    async def both():
        waiting = asyncio.create_task(second.claim("a", 10))
        while first.wanted() != ["a"]:
            await asyncio.sleep(0.01)
        assert not second.wanted()
        first.release("a", forget=forget)
        return await waiting

    assert asyncio.run(both())
    assert "a" in second
    assert not second.wanted()
    assert not claim(first)


def test_a_name_that_is_forgotten_leaves_no_file(two, tmp_path):
    first, second = two
    claim(first)
    assert not claim(second, seconds=0.1)
    first.release("a", forget=True)
    first.release("a", forget=True)  # without effect
    assert [x.name for x in (tmp_path / "claims").rglob("*")] == ["wanted"]


def test_a_file_that_is_deleted_meanwhile_is_no_claim(two, monkeypatch):
    """Between opening the file and locking it."""
    first, second = two
    claim(first)
    lock = fcntl.flock

    def late(file, operation):
        monkeypatch.undo()
        first.release("a", forget=True)
        lock(file, operation)

    monkeypatch.setattr("fcntl.flock", late)
    assert not claim(second)
    assert claim(second)
    assert not claim(first)


def test_claims_end_with_their_process(tmp_path):
    """What they have noted stays."""
    code = (
        "import asyncio, sys; from pathlib import Path; from sinkattn.serve.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1])); assert asyncio.run(claims.claim('a', 0))\n"
        "claims.note('a', is_unsaved=True); print('-', flush=True); input()"
    )
    claims, process = (
        Claims(tmp_path),
        subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE),
    )
    with process:
        process.stdout.readline()
        assert not claim(claims)
        process.kill()
    assert claim(claims)
    assert claims.is_unsaved("a")
    claims.note("a", is_unsaved=False)
    claims.release("a", forget=False)
    assert not claims.is_unsaved("a")
    assert claim(claims)
    assert not claims.is_unsaved("a")


@pytest.fixture
def servers(make_server, run_server, tmp_path):
    with run_server(make_server(folder=tmp_path)) as first, run_server(make_server(folder=tmp_path)) as second:
        yield first, second


def say(running, text, id="a", **options):
    reply = running.chat(text, session_id=id, append=True, **options)
    return reply.choices[0].message.content


def test_a_session_goes_on_at_whichever_server_is_asked(servers, make_server, run_server):
    """Replies are those of one server; each has all that was said at the other."""
    first, second = servers
    turns = ["One", "Two", "Three", "Four"]
    with run_server(make_server()) as alone:
        expected = [say(alone, text) for text in turns]
        tokens = alone.http.get("/v1/sessions/a").json()["tokens"]
    assert [say(servers[index % 2], text) for index, text in enumerate(turns)] == expected
    assert (len(first.server.sessions), len(second.server.sessions)) == (0, 1)
    assert first.http.get("/v1/sessions/a").json()["tokens"] == tokens
    assert (len(first.server.sessions), len(second.server.sessions)) == (1, 0)


def test_a_session_without_a_name_is_handed_over_by_its_id(servers):
    first, second = servers
    reply = first.chat("One")
    tokens = first.http.get(f"/v1/sessions/{reply.session_id}").json()["tokens"]
    assert second.http.get(f"/v1/sessions/{reply.session_id}").json()["tokens"] == tokens
    assert not len(first.server.sessions)


def test_forks_and_deletion_know_what_is_at_another_server(servers, tmp_path):
    first, second = servers
    say(first, "One", "a")
    say(second, "One", "b")
    assert first.http.post("/v1/sessions/a/fork", json={"session_id": "b"}).status_code == 409
    fork = first.http.post("/v1/sessions/a/fork", json={"session_id": "c"}).json()
    assert second.http.get("/v1/sessions/c").json()["tokens"] == fork["tokens"]
    assert second.http.delete("/v1/sessions/a").json()["deleted"]
    assert first.http.get("/v1/sessions/a").status_code == 404
    for id in "bc":
        first.http.delete(f"/v1/sessions/{id}").raise_for_status()
    assert [x.name for x in tmp_path.rglob("*") if x.is_file()] == []


def lose(server):
    """Let a server's claims end, as if it had been killed."""
    claims = server.sessions._store._claims
    for file in claims._files.values():
        os.close(file)
    claims._files.clear()
    server.folder = server.sessions._store = None


def test_turns_that_are_lost_are_told_once(servers):
    first, second = servers
    for id in ("saved", "more", "none", "history"):
        say(first, "One", id)
    for id in ("saved", "more", "history"):
        first.http.post(f"/v1/sessions/{id}/save").raise_for_status()
    for id in ("more", "history"):
        say(first, "Two", id)
    lose(first.server)
    say(second, "Two", "saved")
    for id in ("more", "none"):
        assert second.http.get(f"/v1/sessions/{id}").status_code == (200 if id == "more" else 404)
    with pytest.raises(openai.ConflictError, match="lost") as caught:
        say(second, "Two", "more")
    assert caught.value.code == "turns_lost"
    say(second, "Two", "more")
    tokens = [second.http.get(f"/v1/sessions/{id}").json()["tokens"] for id in ("saved", "more")]
    assert tokens[0] == tokens[1]
    with pytest.raises(openai.ConflictError, match="lost"):
        say(second, "Two", "none")
    say(second, "One", "none")
    assert second.chat("One", session_id="history").choices  # has the whole history


def test_a_session_at_work_is_waited_for(servers, monkeypatch):
    first, second = servers
    client = first.client()
    events = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Go"}],
        max_tokens=4000,
        stream=True,
        extra_body={"session_id": "a"},
    )
    next(events)
    monkeypatch.setattr("sinkattn.serve.store.CLAIM_SECONDS", 0.3)
    with pytest.raises(openai.InternalServerError, match="another server") as caught:
        say(second, "And?")
    assert (caught.value.status_code, caught.value.code) == (503, "session_elsewhere")
    assert int(caught.value.response.headers["Retry-After"]) > 0
    assert not len(second.server.sessions)
    monkeypatch.setattr("sinkattn.serve.store.CLAIM_SECONDS", 20)
    waiting = threading.Thread(target=say, args=(second, "And?"))
    waiting.start()
    time.sleep(0.2)
    assert len(first.server.pool) == 1
    events.close()
    waiting.join()
    assert (len(first.server.sessions), len(second.server.sessions)) == (0, 1)


def test_a_server_that_ends_hands_over_first_what_is_wanted(make_server, run_server, tmp_path, monkeypatch):
    save, ids, saved = Store.save, "abcdef", []

    def slow(store, owner, id, *arguments):
        time.sleep(0.3)
        save(store, owner, id, *arguments)
        saved.append(id)

    with run_server(make_server(folder=tmp_path)) as second:
        with run_server(make_server(folder=tmp_path)) as first:
            for id in ids:
                say(first, "One", id)
            monkeypatch.setattr(Store, "save", slow)
            wanting = threading.Thread(target=say, args=(second, "Two", ids[-1]))
            ending = threading.Thread(target=first.end)
            ending.start()
            first.wait_until(lambda: first.server.is_ending)
            wanting.start()
            wanting.join()
            assert len(saved) < len(ids)
            ending.join()
        assert sorted(saved) == [*ids]


def test_a_session_that_cannot_be_saved_stays(servers, monkeypatch):
    first, second = servers
    say(first, "One")
    tokens = first.http.get("/v1/sessions/a").json()["tokens"]

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr("sinkattn.serve.store.Store.save", full)
    monkeypatch.setattr("sinkattn.serve.store.CLAIM_SECONDS", 0.3)
    assert second.http.get("/v1/sessions/a").status_code == 503
    assert first.http.get("/v1/sessions/a").json()["tokens"] == tokens


@pytest.mark.parametrize(("num_streams", "num_sessions"), [(8, 2), (1, 4)])
def test_many_requests_at_two_servers(make_server, run_server, tmp_path, num_streams, num_sessions):
    """Threads append to few sessions at either server: no turn is lost, and none comes twice.

    Also where there is room for one of them at a time.
    """
    turns, failures, end = 6, [], time.monotonic() + 60

    def converse(index):
        try:
            for turn in range(turns):
                while True:
                    with contextlib.suppress(openai.RateLimitError):
                        say(servers[(turn + index) % 2], "x", f"s{index % num_sessions}", max_tokens=1)
                        break
                    assert time.monotonic() < end
                    time.sleep(0.01)
        except Exception as error:
            failures.append(error)

    def small():
        return run_server(make_server(max_streams=num_streams, folder=tmp_path))

    with small() as first, small() as second:
        servers = first, second
        threads = [threading.Thread(target=converse, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        for server in servers:
            assert len(server.server.pool) == len(server.server.sessions) <= num_streams
        tokens = [first.http.get(f"/v1/sessions/s{index}").json()["tokens"] for index in range(num_sessions)]
    with run_server(make_server()) as alone:
        for _ in range(turns * 4 // num_sessions):
            say(alone, "x", max_tokens=1)
        assert tokens == [alone.http.get("/v1/sessions/a").json()["tokens"]] * num_sessions
