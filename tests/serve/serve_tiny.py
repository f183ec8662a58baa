"""Serves a tiny random model on a free port, which is printed; the argument is the folder of saved sessions."""

import sys
import threading
import time
from pathlib import Path

import torch
import uvicorn
from chat_models import CHATML, tiny_model, with_template

import sinkattn
from sinkattn.hf.load import load
from sinkattn.serve.app import create_app
from sinkattn.serve.server import Server

torch.manual_seed(0)
tokenizer = with_template(load()[1], CHATML)
model = tiny_model(tokenizer)
model.generation_config.eos_token_id = None
sinkattn.enable(model, 0, 200, 64)
pool = sinkattn.StreamPool(model, 8, tokenizer=tokenizer, max_prefix=64)
server = uvicorn.Server(
    uvicorn.Config(
        create_app(Server(pool, "tiny", 200, folder=Path(sys.argv[1]))),
        port=0,
        log_level="warning",
        timeout_graceful_shutdown=3,
    )
)


def tell_port():
    while not server.started:
        time.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)


threading.Thread(target=tell_port, daemon=True).start()
server.run()
