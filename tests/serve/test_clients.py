"""What clients send by default is taken, and what would change the reply is not ignored."""

import pytest

HELLO = [{"role": "user", "content": "Hello"}]


def reply_to(running, messages, **fields):
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}
    response = running.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": None, "n": 1, "logit_bias": None, "user": "65f0", "presence_penalty": 0, "frequency_penalty": 0},
        {"stream": None, "stream_options": None, "append": None, "response_format": {"type": "text"}, "seed": None},
        {"tools": [], "functions": None, "tool_choice": "auto", "parallel_tool_calls": False},
        {"metadata": {"user_id": "a", "tags": ["x"]}, "store": False, "service_tier": "auto", "modalities": ["text"]},
        {"reasoning_effort": "low", "verbosity": "medium", "prompt_cache_key": "k", "safety_identifier": "s"},
        {"logprobs": False, "top_logprobs": None, "max_completion_tokens": None, "stop": []},
    ],
)
def test_defaults_of_clients(running, fields):
    assert reply_to(running, HELLO, **fields) == reply_to(running, HELLO)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"modalities": ["text", "audio"]},
        {"max_token": 5},  # misspelt
        {"stop": ""},
    ],
)
def test_what_would_change_a_reply_is_refused(running, fields):
    response = running.http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **fields})
    assert response.status_code == 400
    assert next(iter(fields)) in response.json()["error"]["message"]


def test_messages_of_one_role_are_one(running):
    user, system = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "system"))
    twice = reply_to(running, [system("Be kind."), system("Be brief."), user("One"), user("Two")])
    assert twice == reply_to(running, [system("Be kind.\n\nBe brief."), user("One\n\nTwo")])
    assert twice != reply_to(running, [system("Be kind."), user("Two")])
    for others in (
        [user("One"), system("Be brief."), user("Two")],
        [user("One"), {"role": "assistant", "content": "a"}],
    ):
        response = running.http.post("/v1/chat/completions", json={"model": "tiny", "messages": others})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_a_history_that_was_cut_before_a_reply(running):
    """So clients do that send the last messages only; the template of the test writes replies without questions."""
    cut = [{"role": "assistant", "content": "Hi"}, *HELLO]
    assert reply_to(running, cut) != reply_to(running, HELLO)


def test_messages_of_the_client_library_are_sent_back(running):
    first = running.chat("One", session_id="back")
    for message in (first.choices[0].message, first.choices[0].message.model_dump()):
        messages = [{"role": "user", "content": "One"}, message, {"role": "user", "content": "Two"}]
        assert running.chat(messages, session_id="back").usage.prompt_tokens_details.cached_tokens

    create = running.client().responses.create
    items = [{"role": "user", "content": "One"}]
    response = create(model="tiny", input=items, max_output_tokens=4, temperature=0)
    for output in (response.output, [item.model_dump() for item in response.output]):
        more = create(
            model="tiny",
            input=[*items, *output, {"role": "user", "content": "Two"}],
            max_output_tokens=4,
            include=["reasoning.encrypted_content"],
            reasoning={"effort": "low"},
            text={"verbosity": "low"},
            tools=[],
            parallel_tool_calls=True,
        )
        assert more.output_text


def test_a_prompt_in_a_list(running):
    create = running.client().completions.create
    texts = [create(model="tiny", prompt=prompt, max_tokens=4).choices[0].text for prompt in ("import", ["import"])]
    assert texts[0] == texts[1]
    assert create(model="tiny", prompt=[[5, 6, 7]], max_tokens=4).usage.prompt_tokens == 3
    assert running.http.post("/v1/completions", json={"model": "tiny", "prompt": ["a", "b"]}).status_code == 400


def test_names_of_sessions(running):
    """In the body or the header, for each kind of request; never two."""
    bodies = {"chat/completions": {"messages": HELLO}, "completions": {"prompt": "a"}, "responses": {"input": "a"}}
    for path, body in bodies.items():
        body = {"model": "tiny", "max_output_tokens" if path == "responses" else "max_tokens": 2, **body}
        for extra, header in (({"session_id": path.replace("/", ".")}, {}), ({}, {"X-Session-ID": f"h.{path[:4]}"})):
            response = running.http.post(f"/v1/{path}", json={**body, **extra}, headers=header)
            assert response.json()["session_id"] == (extra.get("session_id") or header["X-Session-ID"])
        response = running.http.post(f"/v1/{path}", json={**body, "session_id": "a"}, headers={"X-Session-ID": "b"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "session_id")
    for id_ in (".", "..", "a/b", "a b", "a\n", "", "x" * 201):
        response = running.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "session_id": id_})
        assert response.status_code == 400, id_
