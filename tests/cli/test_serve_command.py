"""``sinkattn serve``."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

from sinkattn.cli import main
from sinkattn.cli.errors import UserError
from sinkattn.cli.serve import _is_loopback, _keys
from sinkattn.hf.load import DEMO_MODEL


class Arguments:
    api_keys = None


def test_keys(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKATTN_API_KEYS", "one, b: two")
    one, four = (hashlib.sha256(key.encode()).hexdigest() for key in ("one", "four"))
    assert _keys(Arguments) == {one: "one", "b": "two"}
    file = tmp_path / "keys"
    file.write_text("# comment\n  # d:comment\nc:three==\n\nfour\n")
    arguments = Arguments()
    arguments.api_keys = file
    assert _keys(arguments) == {one: "one", "b": "two", "c": "three==", four: "four"}


@pytest.mark.parametrize(
    ("lines", "got"), [("a:one\na:two", "another of 'a'"), ("a:", "no key"), ("one\none", "another")]
)
def test_keys_that_would_let_others_in_or_be_lost(tmp_path, monkeypatch, lines, got):
    monkeypatch.delenv("SINKATTN_API_KEYS", raising=False)
    arguments = Arguments()
    arguments.api_keys = tmp_path / "keys"
    arguments.api_keys.write_text(lines)
    with pytest.raises(UserError, match=got):
        _keys(arguments)


def test_loopback():
    assert all(_is_loopback(host) for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"))
    assert not any(_is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"))


def test_other_hosts_need_keys(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SINKATTN_API_KEYS", raising=False)
    assert main(["serve", str(DEMO_MODEL), "--host", "0.0.0.0"]) == 2
    assert "expected --api-keys" in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n")
    assert main(["serve", str(DEMO_MODEL), "--api-keys", str(tmp_path / "empty")]) == 2
    assert "expected a key or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replicas", "2"], "expected --sessions"),
        (["--replicas", "0", "--sessions", "x"], "1 or more"),
        (["--replicas", "3-2", "--sessions", "x"], "N up to M"),
    ],
)
def test_invalid_replicas(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        raise SystemExit(main(["serve", str(DEMO_MODEL), *arguments]))
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_replicas_from_the_command_line(tmp_path):
    """They save their sessions when they are asked to end."""
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "sinkattn", "serve", str(DEMO_MODEL), "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(x for x in sys.path if x), "SINKATTN_API_KEYS": "secret"}
    arguments = ["--sessions", str(tmp_path), "--replicas", "1", "--max-tokens", "7"]
    with subprocess.Popen([*command, *arguments], env=environment) as process:
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=60, headers={"Authorization": "Bearer secret"}
        )
        end = time.monotonic() + 120
        while not _is_ready(client):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        body = {"model": "demo_model", "prompt": "x = ", "max_tokens": 7, "session_id": "kept"}
        assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] <= 7
        assert client.post("/v1/completions", json={**body, "max_tokens": 8}).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert len([*tmp_path.glob("*.safetensors")]) == 1


def _is_ready(client):
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
def test_a_server_from_the_command_line(tmp_path):
    """It says where it is, keeps no word of a request in its log, and saves its sessions when it is interrupted."""
    command = [sys.executable, "-m", "sinkattn", "serve", str(DEMO_MODEL), "--port", "0", "--sessions", str(tmp_path)]
    environment = {**os.environ, "SINKATTN_API_KEYS": "a:secret"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "running on" in line:
                break
        port = int(json.loads(line)["message"].split(":")[2].split()[0])
        body = {"model": "demo_model", "prompt": "unheard_of = ", "max_tokens": 3, "session_id": "kept"}
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        answer = httpx.post(url, json=body, timeout=60, headers={"Authorization": "Bearer secret"})
        assert answer.json()["usage"]["completion_tokens"] == 3
        process.send_signal(signal.SIGINT)
        lines += process.stderr.readlines()
        assert process.wait(30) == 0
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    requests = [(x["path"], x["status"]) for x in logged if x["message"] == "request"]
    assert requests == [("/v1/completions", 401), ("/v1/completions", 200)]
    assert not any("unheard_of" in line or "secret" in line for line in lines)
    assert len([*tmp_path.glob("*.safetensors")]) == 1
