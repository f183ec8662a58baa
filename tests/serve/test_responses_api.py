"""``/v1/responses`` by OpenAI's own client."""

import json

import openai
import pytest


@pytest.fixture
def respond(running):
    def respond(said, /, **options):
        return running.client().responses.create(
            model="tiny", input=said, **{"max_output_tokens": 6, "temperature": 0, **options}
        )

    return respond


def test_a_response_is_the_reply_of_a_chat(running, respond):
    response = respond("Hello", instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat = running.chat(messages, max_tokens=6, session_id="responses")
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens


def test_going_on_after_a_response(respond):
    first = respond("One")
    second = respond("Two", previous_response_id=first.id)
    assert second.usage.input_tokens_details.cached_tokens == first.usage.total_tokens + 2
    third = respond("Three", previous_response_id=second.id)
    assert third.session_id == first.session_id
    # After an earlier one, in a copy of the stream; the first stream goes on as if nothing had been.
    other = respond("Two", previous_response_id=first.id)
    assert other.output_text == second.output_text
    assert other.session_id != first.session_id
    again = respond("Three", previous_response_id=other.id)
    assert again.output_text == third.output_text
    assert respond("Four", previous_response_id=third.id).session_id == first.session_id


def test_a_copy_that_has_a_name_is_not_gone_on_in(running, respond):
    first = respond("One", extra_body={"session_id": "original"})
    for id in ("early", "late"):
        copy = running.http.post("/v1/sessions/original/fork", json={"session_id": id}).json()
    assert respond("Two", previous_response_id=first.id).session_id == "original"
    # The original has gone on now; a copy is copied.
    assert respond("Other", previous_response_id=first.id).session_id not in ("original", "early", "late")
    sessions = {x["id"]: x["tokens"] for x in running.http.get("/v1/sessions").json()["data"]}
    assert sessions["early"] == sessions["late"] == copy["tokens"] < sessions["original"]


def test_events(running, respond):
    whole = respond("Events", max_output_tokens=12)
    events = [*respond("Events", max_output_tokens=12, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert events[-1].response.output_text == whole.output_text
    after = respond("More", previous_response_id=events[-1].response.id)
    assert after.usage.input_tokens_details.cached_tokens


def test_json(respond):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "name": "answer", "schema": schema, "strict": True}
    response = respond("Is it?", text={"format": form}, max_output_tokens=40)
    assert json.loads(response.output_text) == {"n": None}
    assert response.status == "completed"


def test_going_on_after_a_response_of_a_session_that_is_saved(make_server, run_server, tmp_path):
    """As the pool was full, as the server has ended, and as another server has it."""

    def respond(running, before=None, **options):
        extra = {"extra_body": options} if options else {}
        return running.client().responses.create(
            model="tiny", input="One", max_output_tokens=6, temperature=0, previous_response_id=before, **extra
        )

    with run_server(make_server()) as running:
        expected = [respond(running, session_id="a")]
        for _ in range(3):
            expected.append(respond(running, expected[-1].id))
    with run_server(make_server(max_streams=1, folder=tmp_path)) as running:
        got = [respond(running, session_id="a")]
        running.chat("Other", session_id="b")
        got.append(respond(running, got[-1].id))
    with run_server(make_server(folder=tmp_path)) as one, run_server(make_server(folder=tmp_path)) as other:
        got.append(respond(one, got[-1].id))
        got.append(respond(other, got[-1].id))
        for running in (one, other):
            with pytest.raises(openai.NotFoundError, match="not known"):
                respond(running, "resp_0.a")
        assert respond(one, got[0].id).output_text == expected[1].output_text  # in a copy
    assert [x.output_text for x in got] == [x.output_text for x in expected]
    assert [x.usage for x in got] == [x.usage for x in expected]


def test_errors(running, respond):
    with pytest.raises(openai.NotFoundError, match="not known"):
        respond("a", previous_response_id="resp_none")
    first = respond("a", instructions="Be kind.")
    with pytest.raises(openai.BadRequestError, match="system prompt"):
        respond("b", instructions="Be rude.", previous_response_id=first.id)
    respond("b", instructions="Be kind.", previous_response_id=first.id)
    for changed in ({"tools": [{"type": "web_search"}]}, {"input": []}, {"input": " "}, {"max_output_tokens": -1}):
        assert running.http.post("/v1/responses", json={"model": "tiny", "input": "a", **changed}).status_code == 400
    assert running.server.num_at_work == 0
