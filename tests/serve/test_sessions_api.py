"""Streams that stay alive between requests."""

import contextlib
import time

import httpx
import openai
import pytest

from sinkattn.serve.access import Keys
from sinkattn.serve.limits import Limits
from sinkattn.serve.store import Store


def talk(running, texts, messages=None, **options):
    """Say something several times, with the whole history each time; returns the history and the last reply."""
    messages = [] if messages is None else messages
    for text in texts:
        messages.append({"role": "user", "content": text})
        reply = running.chat(messages, **options)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
    return messages, reply


def plain(running):
    """Options for a reply that is encoded to the ids that were generated."""
    [word] = running.server.tokenizer(" import", add_special_tokens=False).input_ids
    return {"logit_bias": {str(word): 1000.0}, "max_tokens": 1}


def cached(reply):
    return reply.usage.prompt_tokens_details.cached_tokens


def test_a_history_continues_its_stream_without_a_name(running):
    messages, first = talk(running, ["One"])
    _, second = talk(running, ["Two"], messages)
    assert second.session_id == first.session_id
    assert cached(second) == first.usage.total_tokens + 2  # the end of the reply
    assert second.usage.prompt_tokens > cached(second)


def test_a_request_about_a_session_does_not_make_it_busy(running):
    running.chat("Hello", session_id="calm")
    assert running.http.get("/v1/sessions/calm").json()["is_busy"] is False


def test_replies_are_those_of_one_who_has_the_whole_history(make_server, run_server):
    """As no message is evicted, the session's replies equal those to the whole history in a new stream."""
    with run_server(make_server()) as running:
        messages, _ = talk(running, ["One", "Two"], session_id="a", **plain(running))
        messages, reply = talk(running, ["Three"], messages, session_id="a")
        anew = running.chat(messages[:-1], session_id="b")
        assert cached(reply)
        assert not cached(anew)
        assert anew.choices[0].message.content == reply.choices[0].message.content


def test_other_histories_do_not_continue_it(running):
    messages, first = talk(running, ["Hello", "You"])
    changed = [dict(x) for x in messages] + [{"role": "user", "content": "More"}]
    changed[1]["content"] += "x"
    for others in (
        changed,
        messages[2:] + changed[-1:],
        [{"role": "system", "content": "Be."}, *messages, changed[-1]],
    ):
        reply = running.chat(others)
        assert reply.session_id != first.session_id
        assert not cached(reply)
    assert running.chat([*messages, changed[-1]]).session_id == first.session_id


def test_a_long_chat_costs_the_same_in_each_turn(running):
    """Far beyond the window, with the whole history, and with the last messages of it alone."""
    messages, _ = talk(running, [f"Message {i}" for i in range(40)], max_tokens=12)
    session = running.chat([*messages, {"role": "user", "content": "a"}]).session_id
    state = running.http.get(f"/v1/sessions/{session}").json()
    assert state["tokens"] > 2 * state["tokens_in_sight"]
    assert sum(x["tokens"] for x in state["in_sight"]) == state["tokens_in_sight"]
    assert [x["role"] for x in state["in_sight"]][-2:] == ["user", "assistant"]


def test_the_last_messages_of_a_long_chat_are_enough(running):
    messages, reply = talk(running, [f"Line {i}" for i in range(40)], max_tokens=12)
    shorter = [*messages[-30:], {"role": "user", "content": "more"}]
    again = running.chat(shorter)
    assert again.session_id == reply.session_id
    assert cached(again) > 100
    too_short = running.chat([*messages[-2:], {"role": "user", "content": "more"}])
    assert too_short.session_id != reply.session_id


def test_a_named_session_forgets_what_was_changed(running):
    """A reply that is asked for anew, and a question that is edited."""
    messages, _ = talk(running, ["One"], session_id="edited", **plain(running))
    messages, _ = talk(running, ["Two"], messages, session_id="edited")
    again = running.chat(messages[:-1], session_id="edited")
    assert again.choices[0].message.content == messages[-1]["content"]
    assert cached(again) > 20
    edited = [*messages[:2], {"role": "user", "content": "Something else"}]
    other = running.chat(edited, session_id="edited")
    assert cached(other)
    assert other.choices[0].message.content == running.chat(edited, session_id="new").choices[0].message.content
    everything = running.chat([{"role": "user", "content": "Anew"}], session_id="edited")
    assert not cached(everything)


def test_appending(running):
    first = running.chat("One", session_id="appended", append=True, **plain(running))
    second = running.chat("Two", session_id="appended", append=True)
    assert cached(second) == first.usage.total_tokens + 2
    whole = [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Two"},
    ]
    assert running.chat(whole, session_id="whole").choices[0].message.content == second.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="system prompt"):
        running.chat([{"role": "system", "content": "Other"}, whole[0]], session_id="appended", append=True)
    by_header = running.client().chat.completions.create(
        model="tiny", messages=whole, max_tokens=1, extra_headers={"X-Session-ID": "whole"}
    )
    assert by_header.session_id == "whole"


def test_forks_and_deletion(running):
    running.chat("One", session_id="f", append=True)
    fork = running.http.post("/v1/sessions/f/fork", json={"session_id": "g"}).json()
    assert fork["tokens"] == running.http.get("/v1/sessions/f").json()["tokens"]
    replies = [running.chat("Two", session_id=x, append=True).choices[0].message.content for x in "fg"]
    assert replies[0] == replies[1]
    assert running.http.post("/v1/sessions/f/fork", json={"session_id": "g"}).status_code == 409
    assert {"f", "g"} <= {x["id"] for x in running.http.get("/v1/sessions").json()["data"]}
    before = len(running.server.pool)
    assert running.http.delete("/v1/sessions/f").json()["deleted"]
    assert len(running.server.pool) == before - 1
    assert running.http.get("/v1/sessions/f").status_code == 404
    assert running.http.delete("/v1/sessions/f").status_code == 404


def test_saving_and_a_server_that_starts_anew(make_server, run_server, tmp_path):
    with run_server(make_server(folder=tmp_path)) as running:
        messages, _ = talk(running, [f"Message {i}" for i in range(20)], session_id="kept")
        running.http.post("/v1/sessions/kept/save").raise_for_status()
        question = {"role": "user", "content": "And?"}
        reply = running.chat([*messages, question], session_id="kept")
        running.http.post("/v1/sessions/kept/restore").raise_for_status()
        again = running.chat([*messages, question], session_id="kept")
        assert again.choices[0].message.content == reply.choices[0].message.content
        running.chat("Text", session_id="ends")  # saved at the end
    with run_server(make_server(folder=tmp_path)) as running:
        third = running.http.get("/v1/sessions/kept").json()
        after = [*messages, question, {"role": "assistant", "content": again.choices[0].message.content}, question]
        last = running.chat(after, session_id="kept")
        assert cached(last) == third["tokens_in_sight"]
        assert running.http.get("/v1/sessions/ends").json()["tokens"]
        running.http.delete("/v1/sessions/ends").raise_for_status()
        assert running.http.get("/v1/sessions/ends").status_code == 404
        assert running.http.post("/v1/sessions/none/save").status_code == 404
    with run_server(make_server(folder=tmp_path, window=100)) as running:  # not the model that it was
        response = running.http.get("/v1/sessions/kept")
        assert response.status_code == 409
        assert "window" in response.json()["error"]["message"]


def test_saved_sessions_are_listed(make_server, run_server, tmp_path):
    """Those that are live and those that are only saved, to their own client, after a restart too."""
    keys, limits = Keys({"a": "first", "b": "second"}), Limits(sessions_per_key=4)

    def listed(running, key="first"):
        header = {"Authorization": f"Bearer {key}"}
        return {x["id"]: x for x in running.http.get("/v1/sessions", headers=header).json()["data"]}

    with run_server(make_server(folder=tmp_path, keys=keys)) as running:
        for id in "rst":
            running.chat(f"Number {id}", "first", session_id=id)
        running.chat("Number s", "second", session_id="s")
        running.chat("Without a name", "first")
        running.client("first").post("/sessions/r/save", cast_to=httpx.Response)
        before = listed(running)
        assert {x["status"] for x in before.values()} == {"live"}
        assert len(before) == 4
    # A pool of one stream: what is asked for below needs no more.
    with run_server(make_server(max_streams=1, folder=tmp_path, keys=keys, limits=limits)) as running:
        http = running.http
        http.headers["Authorization"] = "Bearer first"
        after = listed(running)
        assert sorted(after) == ["r", "s", "t"]
        for id, session in after.items():
            same = ("object", "created", "tokens", "tokens_in_sight", "in_sight", "is_busy")
            assert [session[name] for name in same] == [before[id][name] for name in same]
            assert session["status"] == "saved"
            assert 0 <= session["idle_seconds"] < 60
        assert [*listed(running, "second")] == ["s"]
        assert not len(running.server.pool)  # nothing was loaded
        assert http.post("/v1/sessions/r/restore").json()["tokens"] == before["r"]["tokens"]
        assert [x["status"] for x in listed(running).values()] == ["live", "saved", "saved"]
        assert listed(running)["r"]["created"] == before["r"]["created"]
        assert http.delete("/v1/sessions/s").json()["deleted"]
        assert http.delete("/v1/sessions/r").json()["deleted"]
        assert [*listed(running)] == ["t"]
        assert [*listed(running, "second")] == ["s"]
        [damaged] = set(tmp_path.glob("*.safetensors")) - {running.server.sessions._store._path("b", "s")}
        damaged.write_bytes(damaged.read_bytes()[:50])
        assert not listed(running)
        assert http.delete("/v1/sessions/t").json()["deleted"]
    assert len([*tmp_path.glob("*.safetensors")]) == 1


def test_nothing_is_saved_without_a_folder(running):
    running.chat("One", session_id="unsaved")
    response = running.http.post("/v1/sessions/unsaved/save")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_store")


def test_sessions_without_a_name_make_room(make_server, run_server):
    with run_server(make_server(max_streams=2, max_parked=1)) as running:
        for index in range(6):
            running.chat(f"Number {index}")
        assert len(running.server.pool) == 3
        for name in "abc":
            running.chat("a", session_id=name)
        with pytest.raises(openai.RateLimitError) as caught:
            running.chat("One too many")
        assert int(caught.value.response.headers["Retry-After"]) > 0
        running.http.delete("/v1/sessions/b")
        assert running.chat("Now").choices


def test_idle_sessions_with_a_name_make_room_in_the_folder(make_server, run_server, tmp_path):
    """The one that was unused for longest goes, and comes back when it is asked for, as if it had stayed."""
    with run_server(make_server()) as running:
        expected = [[running.chat(f"{turn}", session_id=id, append=True) for id in "abcdef"] for turn in range(3)]
    with run_server(make_server(max_streams=2, max_parked=1, folder=tmp_path)) as running:
        for turn, replies in enumerate(expected):
            for id, reply in zip("abcdef", replies, strict=True):
                here = running.chat(f"{turn}", session_id=id, append=True)
                assert here.choices[0].message.content == reply.choices[0].message.content
                assert here.usage == reply.usage
        states = {x["id"]: x["status"] for x in running.http.get("/v1/sessions").json()["data"]}
        assert states == {**dict.fromkeys("def", "live"), **dict.fromkeys("abc", "saved")}
        running.chat("Without a name")
        running.chat("This one makes room without being saved")
        assert len(running.http.get("/v1/sessions").json()["data"]) == 7
        running.http.get("/v1/sessions/a").raise_for_status()  # in its place
        assert len(running.server.pool) == 3


def test_who_makes_room_in_the_folder(make_server, run_server, tmp_path, monkeypatch):
    """None that is used, none of a key that may have no more itself, and none that cannot be saved."""
    keys, limits = Keys({"a": "first", "b": "second"}), Limits(sessions_per_key=2)
    with run_server(make_server(max_streams=3, folder=tmp_path, keys=keys, limits=limits)) as running:
        for id in "xy":
            running.chat("One", "first", session_id=id)
        with pytest.raises(openai.RateLimitError, match="up to 2"):
            running.chat("One", "first", session_id="z")
        running.chat("One", "second", session_id="x")
        with monkeypatch.context() as patch:
            patch.setattr(Store, "save", no_space)
            with pytest.raises(openai.RateLimitError, match="all streams") as caught:
                running.chat("One", "second", session_id="y")
            assert int(caught.value.response.headers["Retry-After"]) > 0
        assert [x.id for key in "ab" for x in running.server.sessions.of(key)] == ["y", "x", "x"]
        running.chat("One", "second", session_id="y")
        assert [x.id for key in "ab" for x in running.server.sessions.of(key)] == ["y", "y", "x"]
        assert running.chat("Two", "first", session_id="x", append=True).usage.prompt_tokens_details.cached_tokens


def test_sessions_that_are_used_make_no_room(make_server, run_server, tmp_path):
    with run_server(make_server(max_streams=3, folder=tmp_path)) as running:
        with contextlib.ExitStack() as stack:
            for id in "ab":
                events = running.chat("Go on", session_id=id, max_tokens=4000, stream=True)
                stack.callback(events.close)
                next(events)
            running.chat("One", session_id="c")
            running.chat("One", session_id="d")  # in the place of c
            fork = running.http.post("/v1/sessions/d/fork", json={"session_id": "e"})  # needs two
            assert (fork.status_code, "all streams" in fork.json()["error"]["message"]) == (429, True)
            assert int(fork.headers["Retry-After"]) > 0
            events = running.chat("Go on", session_id="d", append=True, max_tokens=4000, stream=True)
            stack.callback(events.close)
            next(events)
            with pytest.raises(openai.RateLimitError, match="all streams"):
                running.chat("Two", session_id="c", append=True)
            assert len(running.http.get("/v1/sessions").json()["data"]) == 4
        running.wait_until(lambda: running.server.num_at_work == 0)
        running.http.post("/v1/sessions/d/fork", json={"session_id": "e"}).raise_for_status()
        assert running.chat("Two", session_id="c", append=True).usage.prompt_tokens_details.cached_tokens


def no_space(*arguments):
    raise OSError(28, "No space left on device")


def test_the_most_sessions_of_a_key(make_server, run_server):
    with run_server(make_server(limits=Limits(sessions_per_key=2))) as running:
        running.chat("a", session_id="a")
        for index in range(3):
            running.chat(f"Number {index}")
        assert len(running.server.sessions) == 2
        running.chat("b", session_id="b")
        with pytest.raises(openai.RateLimitError, match="up to 2"):
            running.chat("c", session_id="c")
        assert len(running.server.sessions) == 2


def test_sessions_that_nobody_uses_are_closed(make_server, run_server, monkeypatch):
    monkeypatch.setattr("sinkattn.serve.app.IDLE_CHECK", 0.05)
    with run_server(make_server(limits=Limits(idle_seconds=0.2))) as running:
        running.chat("a", session_id="a")
        time.sleep(0.05)
        assert len(running.server.pool) == 1
        running.wait_until(lambda: not len(running.server.pool))
