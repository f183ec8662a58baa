"""bench/bench_serve.py: the client, the comparison of servers and the figures, without servers."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
import torch
from serve_client import Chat, Reply, SessionChat, WrongAnswer
from serve_model import CHAT_TEMPLATE, _say_only, _words, write_model
from serve_peer import Burst, Peer, agreement
from serve_report import late_row, load_rows, table

from sinkattn.hf.load import DEMO_MODEL, load

WORDS = [" a", " b", " c"]


def events(*, pieces=(" a", " b"), finish_reason="length", usage=None, done=False) -> str:
    choices = [{"delta": {"content": piece}, "finish_reason": None} for piece in ("", *pieces)]
    choices.append({"delta": {}, "finish_reason": finish_reason})
    bodies = [{"choices": [choice]} for choice in choices]
    bodies.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(pieces), **(usage or {})}})
    lines = [f"data: {json.dumps(body)}\n\n" for body in bodies]
    return "".join(lines) + "data: [DONE]\n\n" * done


def client(*answers: str | httpx.Response, requests: list | None = None) -> httpx.AsyncClient:
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        if requests is not None:
            requests.append(json.loads(request.content))
        text = left.pop(0)
        return httpx.Response(200, text=text) if isinstance(text, str) else text

    return httpx.AsyncClient(base_url="http://server", transport=httpx.MockTransport(answer))


def take_turns(chat: Chat, http: httpx.AsyncClient, count: int) -> list[Reply]:
    async def run() -> list[Reply]:
        return [await chat.turn(http) for _ in range(count)]

    return asyncio.run(run())


def test_a_chat_sends_its_history_and_notes_the_reply():
    requests: list = []
    usage = {"prompt_tokens_details": {"cached_tokens": 7}}
    chat = Chat("m", WORDS, 0, 2)
    first, second = take_turns(chat, client(events(), events(usage=usage, done=True), requests=requests), 2)
    assert (first.text, first.prompt_tokens, first.reused_tokens) == (" a b", 9, None)
    assert second.reused_tokens == 7
    assert 0 < first.first <= first.whole
    assert [message["role"] for message in requests[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert requests[1]["messages"][2]["content"] == " a b"
    assert {name: requests[0][name] for name in ("max_tokens", "temperature", "stream")} == {
        **{"max_tokens": 2, "temperature": 0, "stream": True}
    }


def test_a_session_is_sent_new_messages_only():
    requests: list = []
    take_turns(SessionChat("m", WORDS, 3, 2), client(events(), events(), requests=requests), 2)
    assert [[message["role"] for message in request["messages"]] for request in requests] == [
        ["system", "user"],
        ["user"],
    ]
    assert [(request["session_id"], request["append"]) for request in requests] == [("bench-3", True)] * 2


@pytest.mark.parametrize(
    "answer",
    [
        events(finish_reason="stop"),
        events(pieces=(" a",)),
        events(pieces=(" a", "b")),
        events(usage={"completion_tokens": 3}),
        'data: {"error": "no room"}\n\n',
        "",
        httpx.Response(503, text="busy"),
    ],
)
def test_a_wrong_answer_is_refused(answer):
    with pytest.raises(WrongAnswer):
        take_turns(Chat("m", WORDS, 0, 2), client(answer), 1)


def answered(*texts: str, prompt_tokens=9) -> Chat:
    chat = Chat("m", WORDS, 0, 2)
    chat.replies = [Reply(text, 0.1, 0.2, prompt_tokens, None) for text in texts]
    return chat


def test_replies_are_compared_as_long_as_the_messages_are_the_same():
    same = agreement([answered(" a b", " b c")], [answered(" a b", " b c")])
    assert (same.tokens, same.equal, same.lengths) == (4, 4, None)
    # What follows a reply that differs is a reply to other messages.
    other = agreement([answered(" a b", " b c", " a a")], [answered(" a b", " b b", " a a")])
    assert (other.tokens, other.equal, other.share) == (4, 3, 0.75)
    assert agreement([answered(" a b")], [answered(" a b", prompt_tokens=8)]).lengths == (9, 8)


def peer(name: str, keeps: bool, *bursts: Burst) -> Peer:
    kind = SimpleNamespace(name=name, does="does something", keeps=keeps)
    each = Peer(SimpleNamespace(kind=kind), [answered(" a b")])
    each.bursts = list(bursts)
    return each


def burst(seconds: float, *first: float, reused: int | None = None) -> Burst:
    return Burst(seconds, [Reply(" a b", x, 2 * x, 100, reused) for x in first])


def test_figures_are_medians_over_the_rounds():
    ours = peer("sinkattn serve", True, burst(9, 9, 9), *(burst(2, x, 3 * x, reused=90) for x in (1, 2, 30)))
    slow = peer("slow", False, *(burst(20, 10, 20) for _ in range(3)))
    fast = peer("fast", True, burst(9, 9, 9), *(burst(4, 2, 6) for _ in range(3)))
    rows = load_rows(2, [ours, slow, fast], other_work=1.5)
    assert rows[0]["first"]["requests_per_second"] == pytest.approx(2 / 9)
    later = rows[0]["later"]
    assert (later["requests_per_second"], later["reused"]) == (1, 0.9)
    # Of 2 and 6 seconds, those of the round in the middle.
    assert (later["first_p50_ms"], later["first_p95_ms"], later["whole_p50_ms"]) == pytest.approx((4000, 5800, 8000))
    # What keeps nothing has its first turn among the later ones.
    assert [(row["rounds"], row["first"] == row["later"]) for row in rows] == [(3, False), (3, True), (3, False)]
    # Round by round: 2 seconds by 1, 2 and 30.
    assert rows[2]["ratios"]["first_p50_ms"] == pytest.approx(1)
    assert rows[2]["ratios"]["requests_per_second"] == pytest.approx(0.5)
    late = late_row("all", 100, ours.rounds[0].replies, ours.rounds[1].replies, other_work=0)
    assert (late["late_p50_ms"], late["ratio_p50"], late["reused"]) == (pytest.approx(2000), pytest.approx(0.5), 0.9)

    settings = {"threads": 2, "model": "random", "dtype": "float32", "new_tokens": 2}
    content = {"machine": {"processor": "CPU", "cores": 2}, "versions": {}, "settings": settings}
    lines = table(json.loads(json.dumps({**content, "load": rows, "late": [late]}))).splitlines()
    assert any(line.startswith("2 sessions, later turns: 2.00 times the requests per second of fast") for line in lines)
    assert "| 2 | fast | later | 3 | 0.5 | 4,000 | 5,800 | 8,000 | 11,600 | 100 | not told | 100.0% | 1.5 % |" in lines


def test_the_model_says_words_that_are_read_as_they_were_said(tmp_path):
    model, tokenizer = load(device="cpu")
    words = _words(tokenizer)
    prompt = tokenizer("def test", return_tensors="pt").input_ids
    with torch.no_grad():
        before = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
        _say_only(model, [*words])
        said = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert not words.keys() >= set(before)
    assert words.keys() >= set(said)
    text = tokenizer.decode(said)
    assert tokenizer(text, add_special_tokens=False).input_ids == said
    assert len(text.split()) == len(said)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "assistant", "content": text}], return_dict=False)[-13:-1] == said
    with pytest.raises(ValueError, match="chat template"):
        write_model(tmp_path, str(DEMO_MODEL), torch.float32)
