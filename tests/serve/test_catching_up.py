"""What a reply ends with runs after it, while nobody waits: for the next request, whatever comes in between."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sinkattn.hf.chat.encoder import MessageEncoder

TURNS = 24


@pytest.fixture
def forwards(running, monkeypatch):
    """Ids of all forwards; a function that is put into ``before`` is called with them before each."""
    memory = running.server.pool.scheduler.engine.memory
    run, made = memory.run, Forwards()

    def noted(inputs):
        made.before(inputs[0].ids)
        made.ids.append([*inputs[0].ids])
        return run(inputs)

    monkeypatch.setattr(memory, "run", noted)
    return made


class Forwards:
    def __init__(self):
        self.ids = []

    def before(self, ids):
        """To be replaced."""


def stream_of(running, id_):
    [session] = [session for session in running.server.sessions.of("") if session.id == id_]
    return session.content.stream


def caught_up(running, id_):
    running.wait_until(lambda: not stream_of(running, id_)._state.queue)


def say(running, text, id_):
    return running.chat(text, session_id=id_, append=True, max_tokens=4).choices[0].message.content


def text_in_sight(running, id_):
    return running.server.tokenizer.decode(stream_of(running, id_).in_sight)


def test_a_late_turn_has_one_forward_until_its_first_token_as_an_early_one(running, forwards):
    encoder, turns, wanted = MessageEncoder(running.server.tokenizer), [], []
    for turn in range(TURNS):
        forwards.ids.clear()
        question = "What is it? " * (1 + turn % 4)
        say(running, question, "late")
        caught_up(running, "late")
        turns.append([len(ids) for ids in forwards.ids])
        wanted.append(len([*encoder.question(question), *encoder.before_reply]))
    assert len(stream_of(running, "late")) > 2 * running.server.window
    wanted[0] += len(encoder.prefix)
    # All that is new; the reply token by token; the last token with what the reply ends with, for which more may leave.
    assert [turn[:4] for turn in turns] == [[new, 1, 1, 1] for new in wanted]
    assert {sum(turn[4:]) for turn in turns} == {1 + len(encoder.end)}


def ends(running, ids):
    """Whether this is the forward of what a reply ends with."""
    end = MessageEncoder(running.server.tokenizer).end
    return [*ids[-len(end) :]] == end


def test_nobody_waits_for_the_end_of_a_reply(running, forwards):
    """Neither the client, nor who looks at the session, nor a session that is deleted meanwhile."""
    began, go = threading.Event(), threading.Event()

    def before(ids):
        if ends(running, ids):
            began.set()
            assert go.wait(20)

    forwards.before = before
    said = say(running, "One", "a")
    assert began.wait(20)
    state = running.http.get("/v1/sessions/a").json()
    whole = text_in_sight(running, "a")
    assert whole.endswith(f"<|begin|>user\nOne<|end|>\n<|begin|>assistant\n{said}<|end|>\n")
    assert state["tokens"] == len(stream_of(running, "a"))
    with ThreadPoolExecutor() as threads:
        next_turn = threads.submit(say, running, "Two", "a")
        running.wait_until(lambda: running.server.num_at_work)
        go.set()
        more = f"<|begin|>user\nTwo<|end|>\n<|begin|>assistant\n{next_turn.result()}<|end|>\n"
        assert text_in_sight(running, "a") == whole + more
        caught_up(running, "a")
        began.clear(), go.clear()
        say(running, "Three", "a")
        assert began.wait(20)
        deletion = threads.submit(running.http.delete, "/v1/sessions/a")
        go.set()
        assert deletion.result().is_success
    forwards.before = lambda ids: None
    assert say(running, "One", "a") == said


def test_what_has_failed_runs_with_the_next_request(running, forwards):
    failed = threading.Event()

    def before(ids):
        if ends(running, ids):
            failed.set()
            raise RuntimeError("not now")

    forwards.before = before
    said = say(running, "One", "fails")
    assert failed.wait(20)
    forwards.before = lambda ids: None
    assert stream_of(running, "fails")._state.queue
    more = say(running, "Two", "fails")
    assert text_in_sight(running, "fails").endswith(
        f"<|begin|>user\nOne<|end|>\n<|begin|>assistant\n{said}<|end|>\n"
        f"<|begin|>user\nTwo<|end|>\n<|begin|>assistant\n{more}<|end|>\n"
    )
    assert say(running, "One", "anew") == said
    assert say(running, "Two", "anew") == more
