"""Many clients at once, some of which send nonsense or go away."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from sinkattn.serve.access import Keys
from sinkattn.serve.limits import Limits

SESSIONS, TURNS = 32, 6
KILLS = int(os.environ.get("KILLS", 3))  # more of them before a release


def converse(running, index, turns=TURNS):
    """A conversation by appending; the replies end with a token that only this session may say."""
    tokenizer, replies = running.server.tokenizer, []
    marker = tokenizer.decode([300 + index])
    for turn in range(turns):
        own = {"logit_bias": {str(300 + index): 1000.0}, "max_tokens": 2} if turn % 2 else {"max_tokens": 10}
        messages = [{"role": "user", "content": f"Session {index}, turn {turn}"}]
        if not turn:
            messages.insert(0, {"role": "system", "content": f"You are number {index}."})
        while True:
            with contextlib.suppress(openai.RateLimitError):
                reply = running.chat(messages, f"key {index % 4}", session_id=f"s{index}", append=True, **own)
                break
            time.sleep(0.02)
        text = reply.choices[0].message.content
        if turn % 2:
            assert text == marker * 2
        assert reply.session_id == f"s{index}"
        replies.append(text)
    return replies


def disturb(running, stop, seed):
    """Requests that are malformed or too large, and clients that go away or read slowly."""
    choose, body = random.Random(seed), {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    header = {"Authorization": "Bearer key 3", "Content-Type": "application/json"}
    with httpx.Client(base_url=running.url, timeout=30, headers=header) as http:
        while not stop.is_set():
            kind = choose.randrange(5)
            if kind == 0:
                content = json.dumps(body).encode()[: choose.randrange(40)]
                assert http.post("/v1/chat/completions", content=content).status_code in (400, 429)
            elif kind == 1:
                assert http.post("/v1/completions", content=b"x" * 200_000).status_code == 413
            elif kind == 2:
                assert http.get("/v1/sessions/s0").status_code in (404, 429)  # of another key
            else:
                with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as events:
                    for _ in zip(events.iter_lines(), range(choose.randrange(6)), strict=False):
                        time.sleep(0.03 if kind == 4 else 0)


@pytest.mark.slow
def test_every_session_gets_its_own_tokens(make_server, run_server):
    """Of 32 at once, more than there are rows or requests at a time; each reply is that of the session alone."""
    keys = Keys({f"key {i}": f"key {i}" for i in range(4)})
    limits = Limits(body_bytes=100_000, requests=24)
    with run_server(make_server(max_streams=12, max_parked=40, keys=keys, limits=limits)) as running:
        replies, stop = {}, threading.Event()
        threads = [
            threading.Thread(target=lambda i=i: replies.update({i: converse(running, i)})) for i in range(SESSIONS)
        ]
        others = [threading.Thread(target=disturb, args=(running, stop, seed)) for seed in range(3)]
        for thread in (*threads, *others):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        for thread in others:
            thread.join()
        assert sorted(replies) == [*range(SESSIONS)]
        running.wait_until(lambda: running.server.num_at_work == 0)
        sessions = running.server.sessions
        assert len(running.server.pool) == len(sessions)
        assert not any(x.is_used for i in range(4) for x in sessions.of(f"key {i}"))
        before = psutil.Process().memory_info().rss
        for index in range(0, SESSIONS, 4):
            running.client(f"key {index % 4}").delete(f"/sessions/s{index}", cast_to=httpx.Response)
            assert converse(running, index) == replies[index]
        for _ in range(20):
            converse(running, 0, turns=2)
        assert psutil.Process().memory_info().rss - before < 30e6


@pytest.mark.slow
def test_kills(tmp_path):
    """A server that is killed in the midst of replies: what was saved comes back, bit for bit."""
    script = Path(__file__).with_name("serve_tiny.py")
    question = [{"role": "user", "content": "And now?"}]
    expected = None
    for index in range(KILLS):
        with serving(script, tmp_path) as (process, client):

            def say(messages, id, max_tokens=8):
                extra = {"session_id": id, "append": True}
                return (
                    client.chat.completions.create(
                        model="tiny", messages=messages, max_tokens=max_tokens, temperature=0, extra_body=extra
                    )
                    .choices[0]
                    .message.content
                )

            if expected is None:
                for turn in range(12):
                    say([{"role": "user", "content": f"Turn {turn}"}], "kept")
                client.post("/sessions/kept/save", cast_to=httpx.Response)
                expected = say(question, "kept", 20)
            else:
                with pytest.raises(openai.ConflictError, match="lost"):  # once
                    say(question, "kept", 20)
                assert say(question, "kept", 20) == expected
            events = client.chat.completions.create(
                model="tiny", messages=question, max_tokens=2000, stream=True, extra_body={"session_id": "other"}
            )
            next(events)
            saving = threading.Thread(target=lambda: suppressed(client.post, "/sessions/kept2/save"))
            saving.start()
            time.sleep(0.05 * index)
            process.send_signal(signal.SIGKILL)
            saving.join()


@pytest.mark.slow
def test_kills_while_sessions_make_room(tmp_path):
    """Each session comes back as it was after one of its turns, and says once if later ones are lost."""
    script, ids = Path(__file__).with_name("serve_tiny.py"), "abcdef"
    said, answered = (dict.fromkeys(ids, 0) for _ in range(2))
    tokens: list[int] = []  # of a session after one turn, and after two; all turns have as many
    for index in range(1 + max(1, KILLS // 3)):
        with serving(script, tmp_path, num_streams=2) as (process, client):

            def say(id):
                said[id] += 1
                client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "x"}],
                    max_tokens=4,
                    extra_body={"session_id": id, "append": True},
                )
                answered[id] += 1

            def get(path):
                return client.get(path, cast_to=httpx.Response).json()

            if not tokens:
                for _ in range(2):
                    say("a")
                    tokens.append(get("/sessions/a")["tokens"])
            else:
                saved = {x["id"]: x["tokens"] for x in get("/sessions")["data"]}
                assert len(saved) >= sum(count > 0 for count in answered.values()) - 2
                for id in ids:
                    turns, rest = divmod(saved.get(id, 2 * tokens[0] - tokens[1]) - tokens[0], tokens[1] - tokens[0])
                    assert rest == 0
                    assert turns + 1 <= said[id]
                    are_lost, said[id], answered[id] = turns + 1 < answered[id], turns + 1, turns + 1
                    code = None
                    try:
                        say(id)
                    except openai.ConflictError as error:
                        code = error.code
                        say(id)
                    assert code == "turns_lost" or not (code or are_lost)  # a turn without an answer may be lost, too
            kill = threading.Timer(0.3 + 0.07 * index, process.kill)
            kill.start()
            with contextlib.suppress(openai.APIConnectionError):
                while True:
                    for id in ids:
                        say(id)
            kill.join()


def suppressed(function, path):
    with contextlib.suppress(openai.APIError):
        function(path, cast_to=httpx.Response)


@contextlib.contextmanager
def serving(script, folder, num_streams=16):
    """A server of the tiny model in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, script, folder, str(num_streams)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        port = int(process.stdout.readline())
        yield process, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=30)
    finally:
        process.kill()
        process.wait()


def test_a_server_that_is_asked_to_end_saves_its_sessions(tmp_path):
    script = Path(__file__).with_name("serve_tiny.py")
    with serving(script, tmp_path) as (process, client):
        message = [{"role": "user", "content": "Hello"}]
        extra = {"session_id": "kept"}
        client.chat.completions.create(model="tiny", messages=message, max_tokens=4, extra_body=extra)
        extra = {"session_id": "at-work"}
        events = client.chat.completions.create(
            model="tiny", messages=message, max_tokens=4000, stream=True, extra_body=extra
        )
        next(events)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            "".join(str(event) for event in events)
        assert process.wait(20) is not None
    with serving(script, tmp_path) as (_, client):
        for id in ("kept", "at-work"):
            assert client.get(f"/sessions/{id}", cast_to=httpx.Response).json()["tokens"] > 4
