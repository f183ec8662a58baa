"""A server of a tiny random model, and running a server in a thread with clients of it."""

import threading
import time
from contextlib import contextmanager

import httpx
import openai
import torch
import uvicorn
from chat_models import tiny_model

import sinkattn
from sinkattn.serve.app import create_app
from sinkattn.serve.server import Server

WINDOW = 200


def tiny_server(tokenizer, max_streams=8, max_parked=0, name="tiny", window=WINDOW, headroom=64, **options):
    """A server of a random model, the same one each time, whose replies are as long as they may be."""
    torch.manual_seed(0)
    model = tiny_model(tokenizer)
    model.generation_config.eos_token_id = None
    sinkattn.enable(model, 0, window, headroom)
    pool = sinkattn.StreamPool(
        model, max_streams, max_parked=max_parked, tokenizer=tokenizer, max_prefix=64, tokens_per_step=64
    )
    return Server(pool, name, window, **options)


class Running:
    """A server that runs, and clients of it."""

    def __init__(self, server, port, end):
        self.server, self.url, self.end = server, f"http://127.0.0.1:{port}", end
        self.http = httpx.Client(base_url=self.url, timeout=30)
        self._clients = {}

    def client(self, key="-"):
        if key not in self._clients:
            self._clients[key] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)
        return self._clients[key]

    def chat(self, messages, key="-", **options):
        """A reply of 8 tokens by default, greedy."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        extra = {name: options.pop(name) for name in ("session_id", "append") if name in options}
        options = {"max_tokens": 8, "temperature": 0, **options}
        return self.client(key).chat.completions.create(
            model="tiny", messages=messages, extra_body=extra or None, **options
        )

    def wait_until(self, is_so, seconds=10):
        end = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < end
            time.sleep(0.01)


@contextmanager
def running_server(server, ends_within=5):
    config = uvicorn.Config(create_app(server), port=0, log_level="warning", timeout_graceful_shutdown=ends_within)
    instance = uvicorn.Server(config)
    thread = threading.Thread(target=instance.run, daemon=True)
    thread.start()
    while not instance.started:
        assert thread.is_alive()
        time.sleep(0.01)

    def end():
        instance.should_exit = True
        thread.join(20)

    try:
        yield Running(server, instance.servers[0].sockets[0].getsockname()[1], end)
    finally:
        end()
