"""``/v1/chat/completions`` by OpenAI's own client, compared with the stream that it stands for."""

import json
import math

import openai
import pytest
import torch

from sinkattn import SamplingParams
from sinkattn.hf.chat.encoder import MessageEncoder

SYSTEM = {"role": "system", "content": "Be brief."}


def user(text):
    return {"role": "user", "content": text}


def expected(running, question, max_tokens=8, system=None, **sampling):
    """Ids of the reply to a first question, by a stream of the same pool."""
    encoder = MessageEncoder(running.server.tokenizer, system)
    with running.server.pool.open(encoder.prefix, evict="message", sampling=SamplingParams(**sampling)) as stream:
        stream.feed(encoder.question(question))
        stream.feed(encoder.before_reply, begins_message=encoder.replies_stand_alone)
        return [*stream.generate(max_tokens, stop=encoder.special_ids)]


def test_the_reply_is_that_of_a_stream(running):
    reply = running.chat("What is this?")
    ids = expected(running, "What is this?")
    assert reply.choices[0].message.content == running.server.tokenizer.decode(ids)
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.completion_tokens, reply.usage.prompt_tokens_details.cached_tokens) == (8, 0)


def test_parameters_of_sampling(running):
    ids = expected(running, "Sampled", temperature=0.9, top_p=0.8, top_k=50, presence_penalty=0.5, seed=7)
    reply = running.client().chat.completions.create(
        model="tiny",
        messages=[user("Sampled")],
        max_completion_tokens=8,
        temperature=0.9,
        top_p=0.8,
        presence_penalty=0.5,
        seed=7,
        extra_body={"top_k": 50},
    )
    assert reply.choices[0].message.content == running.server.tokenizer.decode(ids)
    assert ids != expected(running, "Sampled", temperature=0.9, top_p=0.8, top_k=50, presence_penalty=0.5, seed=8)
    biased = running.chat("Biased", logit_bias={"40": 1000.0}, max_tokens=3)
    assert biased.choices[0].message.content == running.server.tokenizer.decode([40] * 3)


def test_events_are_the_whole_reply(running):
    whole = running.chat([SYSTEM, user("Twice")], max_tokens=20)
    events = [
        *running.chat([SYSTEM, user("Twice")], max_tokens=20, stream=True, stream_options={"include_usage": True})
    ]
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert [x.choices[0].finish_reason for x in events if x.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 20
    assert {event.id for event in events} == {events[0].id}


def test_stop(running):
    text = running.chat("Stop", max_tokens=30).choices[0].message.content
    stop = text[10:13]
    stopped = running.chat("Stop", max_tokens=30, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 30


def test_log_probabilities(running):
    reply = running.chat("Scores", logprobs=True, top_logprobs=3, max_tokens=4)
    scores = reply.choices[0].logprobs.content
    assert len(scores) == 4
    for score in scores:
        assert len(score.top_logprobs) == 3
        assert score.top_logprobs[0].token == score.token  # greedy
        assert math.isclose(score.top_logprobs[0].logprob, score.logprob, abs_tol=1e-6)
    encoder = MessageEncoder(running.server.tokenizer)
    ids = [*encoder.prefix, *encoder.question("Scores"), *encoder.before_reply]
    with torch.no_grad():
        logits = running.server.pool.model(torch.tensor([ids])).logits[0, -1]
    assert math.isclose(scores[0].logprob, float(logits.log_softmax(-1).max()), abs_tol=1e-4)


def test_json_schema(running):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"is": {"type": "boolean"}},
        "required": ["is"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    reply = running.chat("Is it?", response_format=form, max_tokens=60)
    assert json.loads(reply.choices[0].message.content)["is"] in (True, False)
    assert reply.choices[0].finish_reason == "stop"


def test_json_that_is_complete_with_the_last_token(running):
    """It has ended by itself; one token fewer, and it has not."""
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"type": "null"}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}

    def ask(most, stream=False):
        return running.chat("Is it?", response_format=form, max_tokens=most, stream=stream)

    count = ask(60).usage.completion_tokens
    for most, reason in ((count, "stop"), (count - 1, "length")):
        assert ask(most).choices[0].finish_reason == [*ask(most, stream=True)][-1].choices[0].finish_reason == reason
        text = {"format": {"type": "json_schema", "name": "answer", "schema": schema}}
        response = running.client().responses.create(
            model="tiny", input="Is it?", text=text, max_output_tokens=most, temperature=0
        )
        assert response.status == ("completed" if reason == "stop" else "incomplete")


@pytest.mark.parametrize(
    ("changed", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages"),
        ({"messages": [SYSTEM]}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, 400, "messages.0.role"),
        ({"messages": [user(" ")]}, 400, "messages"),
        ({"messages": [user("<|end|>")]}, 400, "messages"),
        ({"messages": [user("a"), {"role": "assistant", "content": "<|end|>"}, user("b")]}, 400, "messages"),
        ({"messages": [user("word " * 300)]}, 400, "messages"),
        ({"messages": [{"role": "system", "content": "word " * 300}, user("a")]}, 400, "messages"),
        ({"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}])]}, 400, None),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**9}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_logprobs": 2}, 400, "logprobs"),
        ({"stop": [""]}, 400, "stop"),
        ({"n": 2}, 400, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"logit_bias": {"100000": 1}}, 400, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": 1}}}}, 400, None),
        ({"append": True}, 400, "session_id"),
        ({"session_id": "a/b"}, 400, "session_id"),
    ],
)
def test_errors(running, changed, status, param):
    body = {"model": "tiny", "messages": [user("a")], **changed}
    before = len(running.server.pool)
    response = running.http.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"]
    if param is not None:
        assert error["param"] == param
    assert len(running.server.pool) == before
    assert running.server.num_at_work == 0


def test_errors_are_those_of_the_client_library(running):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        running.client().chat.completions.create(model="other", messages=[user("a")])
    with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
        running.chat("a", tools=[{"type": "function", "function": {"name": "f"}}])


def test_what_is_no_json(running):
    response = running.http.post("/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]
    assert running.http.get("/v1/nothing").status_code == 404
    assert running.http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_after_a_stop_string_the_model_sees_what_the_client_sees(running):
    """It ends in the midst of a token; the next reply is that to the visible texts, though the stream goes on."""
    text = running.chat("Stop", max_tokens=30).choices[0].message.content
    for begin, end in ((10, 13), (11, 20), (0, 2)):
        stop = text[begin:end]
        messages = [user("Stop")]
        reply = running.chat(messages, max_tokens=30, stop=[stop], session_id=f"stopped {begin}".replace(" ", "-"))
        [session] = [x for x in running.server.sessions.of("") if x.id == f"stopped-{begin}"]
        content = reply.choices[0].message.content
        assert content == text[: text.index(stop)]
        encoder = MessageEncoder(running.server.tokenizer)
        count = len([*encoder.prefix, *encoder.question("Stop"), *encoder.before_reply])
        seen = session.content.stream.in_sight[count : -len(encoder.end)]
        assert running.server.tokenizer.decode(seen) == content
        messages += [reply.choices[0].message, user("More")]
        assert running.chat(messages, session_id=f"stopped-{begin}").usage.prompt_tokens_details.cached_tokens


def test_a_reply_that_is_left_between_events_ends_before_the_session_is_free(running, monkeypatch):
    """Or the next request of the session would find that its stream generates already."""
    for index in range(5):
        events = running.chat("Go on", session_id="left", append=True, max_tokens=500, stream=True)
        for _ in zip(events, range(3 + index), strict=False):
            pass
        events.close()
        assert running.chat("And?", session_id="left", append=True, max_tokens=2).choices


def test_a_model_that_fails_leaves_the_session_usable(running, monkeypatch):
    engine = running.server.pool.scheduler.engine
    run = engine.run
    for stream in (False, True):
        before = running.chat("Before", session_id=f"fails-{stream}", append=True)
        left = [3]

        def fail(segments, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise RuntimeError("secret words of the device")
            return run(segments)

        monkeypatch.setattr(engine, "run", fail)
        with pytest.raises(openai.APIError) as caught:
            [*running.chat("x", session_id=f"fails-{stream}", append=True, max_tokens=20, stream=stream)]
        assert "failed" in str(caught.value)
        assert "secret" not in str(caught.value)
        monkeypatch.undo()
        after = running.chat("After", session_id=f"fails-{stream}", append=True)
        assert after.usage.prompt_tokens_details.cached_tokens > before.usage.total_tokens
    assert running.server.num_at_work == 0


def test_system_prompts_that_are_too_long_are_not_kept(running):
    before = running.server._encoder.cache_info().currsize
    for index in range(3):
        with pytest.raises(openai.BadRequestError, match="up to 64 tokens"):
            running.chat([{"role": "system", "content": f"{index} word" * 500}, user("a")])
    assert running.server._encoder.cache_info().currsize == before
