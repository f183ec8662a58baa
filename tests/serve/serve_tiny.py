"""Serves a tiny random model on a free port, which is printed; the argument is the folder of saved sessions."""

import sys
import threading
import time
from pathlib import Path

import uvicorn
from chat_models import CHATML, with_template
from tiny_server import tiny_server

from sinkattn.hf.load import load
from sinkattn.serve.app import create_app

app = create_app(tiny_server(with_template(load()[1], CHATML), folder=Path(sys.argv[1])))
server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=3))


def tell_port():
    while not server.started:
        time.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)


threading.Thread(target=tell_port, daemon=True).start()
server.run()
