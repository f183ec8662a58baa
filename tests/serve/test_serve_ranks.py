"""``torchrun ... sinkattn serve``: a model whose heads are spread over two processes, compared with one process."""

import json
import os
import queue
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from chat_models import tiny_model
from tiny_server import Running

from sinkattn.cli import build_parser, main
from sinkattn.cli.arguments import load_model
from sinkattn.cli.serve import make_server

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--monitor-interval", "0.1"]


def conversation(running, name, turns=2):
    """Replies of a chat that is longer than the window, each request with the whole history."""
    messages, replies = [{"role": "system", "content": f"You are {name}."}], []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"{name} asks for the {turn}. time. " * 4})
        reply = running.chat(messages, max_tokens=12)
        replies.append((reply.choices[0].message.content, reply.usage.prompt_tokens_details.cached_tokens))
        messages.append({"role": "assistant", "content": replies[-1][0]})
    return replies


def answers(running):
    """What a server says: two chats at a time, and after what it refuses and a client that goes away."""
    with ThreadPoolExecutor() as threads:
        found = [*threads.map(lambda name: conversation(running, name), ["Anna", "Bert"])]
    with pytest.raises(openai.BadRequestError, match="prompt: expected ids from 0"):
        running.client().completions.create(model="tiny", prompt=[99999])
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        running.chat("Too long", max_tokens=9999)
    with running.chat("I am in a hurry", max_tokens=1000, stream=True) as events:
        next(iter(events))
    ids = [*range(5, 60)]
    text = running.client().completions.create(model="tiny", prompt=ids, max_tokens=20, temperature=0).choices[0].text
    sampled = running.chat("Dice", temperature=1.5, seed=3, max_tokens=12).choices[0].message.content
    return [*found, text, sampled, conversation(running, "Anna", 3), *saved_and_restored(running)]


def saved_and_restored(running):
    """Replies to the same question: when a session was saved, and when it is as it was then."""
    replies = []
    running.chat("Keep this. " * 9, session_id="kept")
    for action in ("save", "restore"):
        running.http.post(f"/v1/sessions/kept/{action}").raise_for_status()
        replies.append(running.chat("And now?", session_id="kept", append=True).choices[0].message.content)
    return replies


def port_of(launched):
    """The port of a server, once it has started."""
    for line in launched.stderr:
        if "running on" in line:
            return int(json.loads(line)["message"].split(":")[2].split()[0])
    raise AssertionError(f"it has ended with {launched.wait()}")


@pytest.mark.slow
def test_two_ranks_serve_what_one_process_serves(chat_tokenizer, run_server, tmp_path):
    model = tiny_model(chat_tokenizer)
    model.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    words = ["serve", str(tmp_path), "--name", "tiny", "--port", "0", "--window", "100", "--max-streams", "2"]
    words += ["--sessions", str(tmp_path / "sessions")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*LAUNCH, "-m", "sinkattn", *words], stderr=subprocess.PIPE, text=True, env=environment
    ) as it:
        try:
            args = build_parser().parse_args(words)
            args.sessions = tmp_path / "alone"
            with run_server(make_server(*load_model(args), args, {})) as alone:
                want = answers(alone)
            assert want[-2] == want[-1]
            assert want[0][1][1]  # tokens that were there already
            assert answers(Running(None, port_of(it), None)) == want
            ranks = psutil.Process(it.pid).children()
            assert len(ranks) == 2
            it.send_signal(signal.SIGTERM)
            log = it.stderr.read()
            it.wait(20)
            assert not any(rank.is_running() for rank in ranks)
        finally:
            it.terminate()  # torchrun kills what has not ended after half a minute
    assert log.count("Application shutdown complete") == 1
    sizes = {
        each: sum(x.stat().st_size for x in (tmp_path / each).glob("*.safetensors")) for each in ("sessions", "alone")
    }
    assert sizes["alone"] < sizes["sessions"] < 2 * sizes["alone"]  # all heads are there, once
    assert "Error" not in log.partition("SignalException")[0]


def test_a_server_whose_ranks_cannot_go_on_ends(make_server, run_server, monkeypatch):
    signals, server = queue.Queue(), make_server()
    monkeypatch.setattr(type(server.pool), "has_failed", property(lambda pool: True))
    monkeypatch.setattr(signal, "raise_signal", signals.put)
    with run_server(server):
        assert signals.get(timeout=20) == signal.SIGTERM


def test_what_is_refused_under_torchrun(monkeypatch, capsys):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for words, reason in {
        ("x", "--replicas", "2", "--sessions", "x"): "--replicas: expected none under torchrun",
        ("x", "--quantize", "int8"): "quantize: expected none for a model that is spread over processes, got int8",
        ("x", "--device", "cpu"): "device: expected none for a model that is spread over processes, got cpu",
        ("x.gguf",): "a GGUF file cannot be spread over processes",
    }.items():
        assert main(["serve", *words]) == 2
        assert reason in capsys.readouterr().err
